"""Accuracy and recalls of a model, in [0, 1], over all processes, each image counted once."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from trainer.datasets import DataSet, Images, Photographs
from trainer.errors import DatasetError, TrainerError
from trainer.images import fit
from trainer.loader import ToModel, in_order
from trainer.processes import ALONE, Processes
from trainer.runlog import append_line

PROTOCOL = "test accuracy of the averaged (EMA) model in [0, 1]; best is chosen on the test images, so it is optimistic"
BATCH, PHOTOGRAPHS = 250, 64  # images at a time
RECALLS = 100  # more classes than this are not listed one by one in the log


def shorter_side(size: int, feed: str) -> int:
    """What the shorter side is scaled to before the centre square of `size` is cut."""
    return round(size * 8 / 7) if feed == "stream" else size


class Evaluated(Dataset[tuple[Tensor, Tensor, int]]):
    """Labeled images in batches, as a process sees them: every W-th from its rank on, none twice.

    Of uint8 `[N, H, W, 3]` or photographs, cut to `size`, those of an index are seen but for the lost ones. `record` is
    where to note photographs that cannot be read, which then do not count; without it, one of them ends the run.
    """

    def __init__(
        self, source: Tensor | Photographs, y: Tensor, index: Tensor | None = None, processes: Processes = ALONE, *,
        size: int = 0, record: Path | None = None, lost: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        index = torch.arange(len(y)) if index is None else index
        if lost:
            index = index[~torch.isin(index, torch.tensor(sorted(lost)))]
        self.count, mine = len(index), index[processes.rank :: processes.world]
        self.parts = [part for part in mine.split(BATCH if isinstance(source, Tensor) else PHOTOGRAPHS) if len(part)]
        self.source, self.y, self.size, self.record = source, y, size, record

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int]:
        """Images, labels, and how many could not be read."""
        part = self.parts[number]
        if isinstance(self.source, Tensor):
            return self.source[part], self.y[part], 0
        pixels, kept = [], []
        for index in part.tolist():
            try:
                image = self.source.read(index)
            except DatasetError as error:
                if self.record is None:
                    raise DatasetError(
                        f"{error}: restore the file, or give --skip-damaged to go on without it."
                    ) from error
                append_line(self.record, {"file": self.source.name(index), "reason": str(error)})
                continue
            kept.append(index)
            pixels.append(np.asarray(fit(image, shorter_side(self.size, "stream"), self.size)))
        stacked = np.stack(pixels) if pixels else np.zeros((0, self.size, self.size, 3), np.uint8)
        return torch.from_numpy(stacked), self.y[torch.tensor(kept, dtype=torch.int64)], len(part) - len(kept)


@dataclass(frozen=True)
class Scores:
    """What a model gets right."""

    confusion: Tensor  # Images of class i that were taken for class j, `[K, K]`.
    top5: float  # Share of the images whose class is among the five first.
    loss: float  # Mean cross-entropy.

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified rightly."""
        return float(self.confusion.diagonal().sum()) / float(self.confusion.sum())

    def recalls(self) -> list[float]:
        """Of each class, the share of its images that is found; NaN where it has none."""
        return (self.confusion.diagonal().double() / self.confusion.sum(1)).tolist()

    def numbers(self, prefix: str, classes: Sequence[str]) -> dict[str, float]:
        """For the log."""
        recalls = zip(classes, self.recalls(), strict=True) if len(classes) <= RECALLS else ()
        first = {
            f"{prefix}_accuracy": self.accuracy, f"{prefix}_accuracy_top5": self.top5, f"{prefix}_loss": self.loss
        }  # fmt: skip
        return first | {f"{'' if prefix == 'test' else prefix + '_'}recall/{name}": value for name, value in recalls}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Evaluated,
    to_model: ToModel,
    classes: int,
    *,
    workers: int = 0,
    processes: Processes = ALONE,
) -> Scores:
    """Classify images."""
    processes.copy_from_first(model.state_dict().values())
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    top5, loss, skipped = 0, 0.0, 0

    def go() -> None:
        nonlocal top5, loss, skipped
        for pixels, labels, unread in in_order(images, workers):
            skipped += unread
            if not len(labels):
                continue
            target = labels.to(to_model.device)
            logits = model(to_model.images(pixels)).float()
            best = logits.topk(min(5, classes)).indices
            confusion.add_(torch.bincount(labels * classes + best[:, 0].cpu(), minlength=classes**2))
            top5 += int((best == target[:, None]).sum())
            loss += float(F.cross_entropy(logits, target, reduction="sum"))

    processes.together(go)
    *counts, top5_all, loss_all, skipped_all = processes.sum([*confusion.tolist(), top5, loss, skipped])
    whole = torch.tensor(counts).long().view(classes, classes)
    seen = int(whole.sum())
    if seen + skipped_all != images.count or not seen:
        raise TrainerError(
            f"evaluation saw {seen} images of {images.count}: none can be read, or the processes list different files."
        )
    return Scores(whole, top5_all / seen, loss_all / seen)


def images_of(data: DataSet, held_out: Tensor | None, processes: Processes, **options: Any) -> Evaluated:
    """The test images of a data set, or training images by their indices as if they were."""
    if held_out is not None:
        lost = data.files.lost if data.files else frozenset[int]()
        source = data.train_x if isinstance(data, Images) else data.train
        return Evaluated(source, data.train_y, held_out, processes, lost=lost, **options)
    if isinstance(data, Images):  # lost ones are not among them
        return Evaluated(data.test_x, data.test_y, processes=processes)
    return Evaluated(data.test, data.test_y, processes=processes, lost=data.files.lost_tests, **options)


@torch.no_grad()
def with_fresh_statistics(
    model: nn.Module, pixels: Tensor, to_model: ToModel, *, images: int = 4096, batch: int = 256
) -> nn.Module:
    """A copy of a model whose BatchNorms hold statistics that its own weights gave, instead of a history of others'.

    Gradient consistency may move channel means, which BatchNorm removes in train mode; running statistics lag behind.
    The same images are taken each time, and no random stream is changed; the statistics are the mean over the batches,
    the variance of a batch unbiased.
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


def summarize(accuracies: list[float], judged: Sequence[float] = ()) -> dict[str, float]:
    """The three numbers that papers report, from all evaluations of a run, at least one.

    `judged` are accuracies on held-out images at the same times; `best` is then that of the first highest of them.
    """
    chosen = judged or accuracies
    return {
        "last": accuracies[-1],
        "median_last_20": statistics.median(accuracies[-20:]),
        "best": accuracies[max(range(len(chosen)), key=chosen.__getitem__)],
    }
