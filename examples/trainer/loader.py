"""Batches by step number: batch k is a pure function of (data, split, options, seed, k).

So resuming needs no loader state, and any number of workers gives the same batches.

Index letters: B labeled images of a step, U = ratio * B unlabeled ones.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradconsist import SSLBatch
from trainer.augment import STRONG_DRAWS, WEAK_DRAWS, strong_view, weak_view
from trainer.config import Config
from trainer.datasets import Images
from trainer.split import Split
from trainer.streams import EndlessOrder, Stream, uniform


class StepImages(NamedTuple):
    """The uint8 images `[*, H, W, 3]` of one step, before normalisation, with what is known of them.

    Attributes:
        x: Labeled images `[B, H, W, 3]`.
        y: Their labels `[B]`.
        weak: Weak views `[U, H, W, 3]`; U is 0 for a supervised run.
        strong: Strong views of the same images.
        indices: Which training images these are `[U]`.
        truth: Their labels `[U]`, for the log only.
    """

    x: Tensor
    y: Tensor
    weak: Tensor
    strong: Tensor
    indices: Tensor
    truth: Tensor


class StepDataset(Dataset[StepImages]):
    """Maps a step number to that step's images.

    Args:
        images: The data set.
        split: Which images are labeled.
        config: Resolved options.
    """

    def __init__(self, images: Images, split: Split, config: Config) -> None:
        self.x, self.y, self.flip = images.train_x, images.train_y, images.flip
        self.labeled = split.labeled
        self.seed, self.batch, self.strong = config.seed, config.batch_size, str(config.strong)
        supervised = config.method == "supervised"
        self.unlabeled_batch = 0 if supervised else config.batch_size * int(config.unlabeled_ratio or 0)
        self.labeled_order = EndlessOrder(config.seed, Stream.LABELED_ORDER, len(split.labeled))
        self.unlabeled_order = EndlessOrder(config.seed, Stream.UNLABELED_ORDER, len(images.train_y))

    def __getitem__(self, step: int) -> StepImages:
        """Build the images of a step."""
        chosen = torch.from_numpy(self.labeled_order.draws(step * self.batch, self.batch))
        labeled = self.labeled[chosen]
        draws = uniform(self.seed, Stream.LABELED_VIEW, step, self.batch, WEAK_DRAWS)
        x = weak_view(self.x[labeled].numpy(), draws, flip=self.flip)
        number = self.unlabeled_batch
        index = torch.from_numpy(self.unlabeled_order.draws(step * number, number))
        plain = self.x[index].numpy()
        draws = uniform(self.seed, Stream.WEAK_VIEW, step, number, WEAK_DRAWS)
        weak = weak_view(plain, draws, flip=self.flip)
        draws = uniform(self.seed, Stream.STRONG_VIEW, step, number, STRONG_DRAWS)
        strong = strong_view(plain, draws, self.strong, flip=self.flip)
        return StepImages(
            torch.from_numpy(x), self.y[labeled], torch.from_numpy(weak), torch.from_numpy(strong), index, self.y[index]
        )


def worker_count(workers: int | None) -> int:
    """Settle `--workers`: as given, else one per core that the training process leaves over, four at most."""
    return min(4, spare_cores()) if workers is None else workers


def spare_cores() -> int:
    """Cores that the training process leaves over, of those that it may run on."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)) - 1


def init_worker(_: int) -> None:
    """Leave signals to the trainer."""
    # Ctrl-C reaches the whole process group: only the trainer answers it. The trainer's own SIGTERM handler,
    # inherited by fork, must not keep a worker alive.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def step_batches(
    dataset: Dataset[StepImages], first: int, last: int, *, workers: int, pin: bool, ahead: int = 4
) -> Iterator[StepImages]:
    """Yield the images of the steps `first .. last - 1`, in order.

    Args:
        dataset: Builds a step's images.
        first: First step.
        last: One past the last step.
        workers: Processes that prepare batches ahead; 0 prepares them here.
        pin: Whether to copy to page-locked memory (for CUDA).
        ahead: Batches that each worker prepares ahead.

    Returns:
        An iterator over the steps' images.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=pin,
        worker_init_fn=init_worker if workers else None,
        generator=torch.Generator(),  # else the loader draws a seed from the global generator
    )
    return iter(loader)


class ToModel:
    """Move uint8 `[N, H, W, 3]` images to the device as normalised floats `[N, 3, H, W]`.

    Args:
        mean: Channel means, in units of 255.
        deviation: Channel standard deviations.
        device: Where the model is.
        channels_last: Memory format of the result.
    """

    def __init__(self, mean: list[float], deviation: list[float], device: torch.device, *, channels_last: bool) -> None:
        self.device, self.channels_last = device, channels_last
        self.scale = (1 / (255 * torch.tensor(deviation, dtype=torch.float64))).float().to(device).view(1, 3, 1, 1)
        self.shift = (torch.tensor(mean, dtype=torch.float64) * 255).float().to(device).view(1, 3, 1, 1)

    def images(self, pixels: Tensor) -> Tensor:
        """Normalise images."""
        x = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        x = x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        return (x.float() - self.shift) * self.scale

    def batch(self, step: StepImages) -> SSLBatch:
        """Turn a step's images into the batch that a method takes."""
        y, index = (part.to(self.device, non_blocking=True) for part in (step.y, step.indices))
        return SSLBatch(self.images(step.x), y, self.images(step.weak), self.images(step.strong), index)
