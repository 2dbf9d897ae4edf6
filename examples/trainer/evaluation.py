"""Test accuracy and recalls of a model, in [0, 1]."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.loader import ToModel

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


@torch.no_grad()
def with_fresh_statistics(
    model: nn.Module, pixels: Tensor, to_model: ToModel, *, images: int = 4096, batch: int = 256
) -> nn.Module:
    """A copy of a model whose BatchNorms hold statistics that its own weights gave, instead of a history of others'.

    Gradient consistency may move channel means, which BatchNorm removes in train mode; running statistics lag behind.

    Args:
        model: The model; it is not changed, and no random stream is.
        pixels: Training images, uint8 `[N, H, W, 3]`; no label is needed.
        to_model: Normalisation and device.
        images: How many of them, the same ones each time.
        batch: Images at a time; the statistics are the mean over the batches, the variance of a batch unbiased.

    Returns:
        The copy, in eval mode.
    """
    fresh = copy.deepcopy(model).eval()
    for module in fresh.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain average over the batches
            module.train()
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:images]
    for rows in chosen.split(batch):
        if len(rows) == batch or len(chosen) < batch:  # a small last batch would weigh as much as the others
            fresh(to_model.images(pixels[rows]))
    return fresh.eval()


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
