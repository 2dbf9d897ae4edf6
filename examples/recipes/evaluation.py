"""Test accuracy and recalls of a model, in [0, 1]."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.loader import ToModel

PROTOCOL = "test accuracy of the averaged (EMA) model in [0, 1]; best is chosen on the test images, so it is optimistic"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    to_model: ToModel,
    *,
    batch: int = 250,
    classes: Sequence[str] = (),
) -> dict[str, float]:
    """Accuracy, mean cross-entropy and recalls over a set of images.

    Args:
        model: In eval mode.
        pixels: uint8 `[N, H, W, 3]`.
        labels: int64 `[N]`.
        to_model: Normalisation and device.
        batch: Images at a time.
        classes: Names of the classes whose recall to give.

    Returns:
        `test_accuracy`, `test_loss`, and `recall/NAME` of each class: the share of its images that are found, NaN
        where it has none.
    """
    loss, predictions = 0.0, []
    for start in range(0, len(labels), batch):
        target = labels[start : start + batch].to(to_model.device)
        logits = model(to_model.images(pixels[start : start + batch])).float()
        predictions.append(logits.argmax(1).cpu())
        loss += float(F.cross_entropy(logits, target, reduction="sum"))
    right = torch.cat(predictions) == labels
    recalls = {f"recall/{name}": float(right[labels == k].double().mean()) for k, name in enumerate(classes)}
    return {"test_accuracy": int(right.sum()) / len(labels), "test_loss": loss / len(labels), **recalls}


def summarize(accuracies: list[float]) -> dict[str, float]:
    """The three numbers that papers report, from all evaluations of a run.

    Args:
        accuracies: Test accuracies in the order of evaluation, at least one.

    Returns:
        `last`, `median_last_20` and `best`.
    """
    return {
        "last": accuracies[-1],
        "median_last_20": statistics.median(accuracies[-20:]),
        "best": max(accuracies),
    }
