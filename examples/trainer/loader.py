"""Batches by number: batch k is a pure function of (data, split, options, seed, k), and each process takes its part.

So resuming needs no loader state, and neither workers nor the number of processes change an image. Whether a run waits
for its images is measured in every step, and said early, once, with a remedy.

Index letters: B labeled images of a batch over all processes, U = ratio * B unlabeled ones, W processes, S side.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradconsist import SSLBatch
from trainer.augment import STRONG_DRAWS, WEAK_DRAWS, View, random_crop, render, strong_crop, strong_view, weak_view
from trainer.config import Config
from trainer.datasets import DataSet, Images, PhotographFolder
from trainer.errors import DatasetError, TrainerError
from trainer.folder import LEFT_OUT
from trainer.processes import ALONE, Processes
from trainer.runlog import append_line
from trainer.split import Split
from trainer.streams import EndlessOrder, Stream, raw, uniform

# Steps that are left out (workers start, kernels are chosen), and steps that are judged.
WARMUP_STEPS = 10
JUDGED_STEPS = 40
# Of the time of a step. Below it, faster loading would gain less than a quarter.
LIMIT = 0.2


class StepImages(NamedTuple):
    """The uint8 images `[*, H, W, 3]` of one batch, before normalisation, with what is known of them."""

    x: Tensor  # Labeled images `[B, H, W, 3]`.
    y: Tensor  # Their labels `[B]`.
    weak: Tensor  # Weak views `[U, H, W, 3]`; U is 0 for a supervised run.
    strong: Tensor  # Strong views of the same images.
    indices: Tensor  # Which training images these are `[U]`.
    truth: Tensor  # Their labels `[U]`, for the log only; -1 where there is none.


class Batches(Dataset[StepImages]):
    """Maps a number to this process's images of that batch."""

    def __init__(self, data: DataSet, split: Split, config: Config, processes: Processes = ALONE) -> None:
        self.data, self.y, self.seed, self.labeled = data, data.train_y, config.seed, split.labeled
        self.batch = config.batch_size
        self.unlabeled_batch = 0 if config.method == "supervised" else self.batch * int(config.unlabeled_ratio or 0)
        self.mine = processes.share(self.batch), processes.share(self.unlabeled_batch)
        trained = torch.ones(len(self.y), dtype=torch.bool)
        trained[split.held_out] = False
        self.unlabeled = torch.nonzero(trained).flatten()
        self.labeled_order = EndlessOrder(config.seed, Stream.LABELED_ORDER, len(self.labeled))
        self.unlabeled_order = EndlessOrder(config.seed, Stream.UNLABELED_ORDER, len(self.unlabeled))
        self.lost = set(data.files.lost) if data.files else set()

    def __getitem__(self, number: int) -> StepImages:
        """Build this process's images of a batch."""
        labeled = self.labeled_order.draws(number * self.batch, self.batch)[self.mine[0]]
        count = self.unlabeled_batch
        unlabeled = self.unlabeled_order.draws(number * count, count)[self.mine[1]]
        return self._build(number, labeled.tolist(), unlabeled.tolist())

    def _build(self, number: int, labeled: list[int], unlabeled: list[int]) -> StepImages:
        raise NotImplementedError

    def _present(self, pool: Tensor, places: list[int]) -> list[int]:
        """The images at some places of a pool; in the place of a lost one, the next that is there."""
        return [next(k for k in self._from(pool, place) if k not in self.lost) for place in places]

    def _from(self, pool: Tensor, place: int) -> Iterator[int]:
        """The images of a pool from a place on, once around."""
        for step in range(len(pool)):
            yield int(pool[(place + step) % len(pool)])
        raise DatasetError("no image of the run can be read any more: restore them, or give another --output.")


class StepDataset(Batches):
    """Batches of images in memory: views are shifted crops."""

    def __init__(self, data: Images, split: Split, config: Config, processes: Processes = ALONE) -> None:
        super().__init__(data, split, config, processes)
        self.x, self.flip, self.strong = data.train_x, data.flip and config.flip, str(config.strong)

    def _build(self, number: int, labeled: list[int], unlabeled: list[int]) -> StepImages:
        chosen = torch.tensor(self._present(self.labeled, labeled), dtype=torch.int64)
        draws = uniform(self.seed, Stream.LABELED_VIEW, number, self.batch, WEAK_DRAWS)[self.mine[0]]
        x = weak_view(self.x[chosen].numpy(), draws, flip=self.flip)
        index = torch.tensor(self._present(self.unlabeled, unlabeled), dtype=torch.int64)
        plain, count = self.x[index].numpy(), self.unlabeled_batch
        draws = uniform(self.seed, Stream.WEAK_VIEW, number, count, WEAK_DRAWS)[self.mine[1]]
        weak = weak_view(plain, draws, flip=self.flip)
        draws = uniform(self.seed, Stream.STRONG_VIEW, number, count, STRONG_DRAWS)[self.mine[1]]
        strong = strong_view(plain, draws, self.strong, flip=self.flip)
        return StepImages(
            torch.from_numpy(x), self.y[chosen], torch.from_numpy(weak), torch.from_numpy(strong), index, self.y[index]
        )


class StepPhotographs(Batches):
    """Batches of photographs that are decoded here: views are random crops of the whole photograph.

    Every view has a seed that follows from the run's seed, the batch, the view's kind and the place in the *global*
    batch. A photograph that cannot be read ends the run; with `--skip-damaged` the next one takes its place, and
    `left_out.jsonl` records it.
    """

    def __init__(self, data: PhotographFolder, split: Split, config: Config, processes: Processes = ALONE) -> None:
        super().__init__(data, split, config, processes)
        self.train, self.size, self.skip = data.train, int(config.image_size or 0), config.skip_damaged
        self.weak = random_crop(self.size, config.crop_scale, flip=config.flip)
        self.strong = strong_crop(str(config.strong), self.size, config.crop_scale, flip=config.flip)
        self.record = Path(str(config.output)) / LEFT_OUT

    def _build(self, number: int, labeled: list[int], unlabeled: list[int]) -> StepImages:
        seeds = self._seeds(Stream.LABELED_VIEW, number, self.batch)[self.mine[0]]
        chosen, (x,) = self._views(self.labeled, labeled, [(self.weak, seeds)])
        kinds = [(self.weak, Stream.WEAK_VIEW), (self.strong, Stream.STRONG_VIEW)]
        wanted = [(v, self._seeds(stream, number, self.unlabeled_batch)[self.mine[1]]) for v, stream in kinds]
        index, (weak, strong) = self._views(self.unlabeled, unlabeled, wanted)
        return StepImages(x, self.y[chosen], weak, strong, index, self.y[index])

    def _seeds(self, stream: Stream, number: int, count: int) -> list[int]:
        """Seeds of the views of the whole batch, below 2^63."""
        return [int(draw) for draw in raw(self.seed, stream, number, count) >> np.uint64(1)]

    def _views(
        self, pool: Tensor, places: list[int], wanted: list[tuple[View, list[int]]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Which photographs, each decoded once, and uint8 tensors `[N, S, S, 3]` of their views."""
        out = np.empty((len(wanted), len(places), self.size, self.size, 3), dtype=np.uint8)
        chosen = []
        for row, place in enumerate(places):
            for index in self._from(pool, place):
                if index in self.lost:
                    continue
                try:
                    image = self.train.read(index)
                except DatasetError as error:
                    self._lose(index, error)
                    continue
                break
            chosen.append(index)
            for kind, (view, seeds) in enumerate(wanted):
                out[kind, row] = render(view, image, seeds[row])
        return torch.tensor(chosen, dtype=torch.int64), list(torch.from_numpy(out))

    def _lose(self, index: int, error: DatasetError) -> None:
        if not self.skip:
            raise DatasetError(
                f"{error}: restore the file, or start the same command again with --skip-damaged to go on without it."
            ) from error
        self.lost.add(index)
        append_line(self.record, {"file": self.train.name(index), "reason": str(error)})


def batches_of(data: DataSet, split: Split, config: Config, processes: Processes) -> Batches:
    """The feed that the options ask for."""
    if isinstance(data, Images):
        return StepDataset(data, split, config, processes)
    return StepPhotographs(data, split, config, processes)


def spare_cores(local_world: int = 1) -> int:
    """Cores that each of a machine's training processes leaves over, of those that it may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return cores // local_world - 1


def worker_count(config: Config, local_world: int = 1) -> int:
    """Settle `--workers` for each process: as given, else the machine's cores shared out, four (or eight) at most."""
    if config.workers is not None:
        return config.workers
    return min(8 if config.feed == "stream" else 4, max(0, spare_cores(local_world)))


def in_order(dataset: Dataset[Any], workers: int, **options: Any) -> DataLoader[Any]:
    """The items of a data set, prepared by workers, which change no random stream."""
    start = init_worker if workers else None
    own = torch.Generator()  # else the loader draws a seed from the global generator
    return DataLoader(dataset, None, num_workers=workers, worker_init_fn=start, generator=own, **options)


def init_worker(_: int) -> None:
    """Leave signals to the trainer."""
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group: only the trainer answers them. A worker that died
    # of one would end the run before its checkpoint. It ends when the trainer closes its queue, or is gone.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Caught(Dataset[StepImages | TrainerError]):
    """A data set that returns what it refuses: raised in a worker, it would come with the worker's traceback."""

    def __init__(self, dataset: Dataset[StepImages]) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> StepImages | TrainerError:
        try:
            return self.dataset[number]
        except TrainerError as error:
            return type(error)(str(error))


def step_batches(
    dataset: Dataset[StepImages], first: int, last: int, *, workers: int, pin: bool, ahead: int = 4
) -> Iterator[StepImages]:
    """Yield the images of the batches `first .. last - 1`, in order."""
    more = {"sampler": range(first, last), "prefetch_factor": ahead if workers else None, "pin_memory": pin}
    for images in in_order(_Caught(dataset), workers, **more):
        if isinstance(images, TrainerError):
            raise images
        yield images


class LoaderWatch:
    """Counts the seconds of waiting for the loader, and those of the steps themselves."""

    def __init__(self, workers: int, spare: int, *, term_later: bool = False) -> None:
        self.workers, self.spare, self.term_later = workers, spare, term_later
        self.steps, self.waited, self.total = 0, 0.0, 0.0
        self._start = 0.0, 0.0

    def add(self, waited: float, stepped: float) -> str | None:
        """Take the seconds of one step."""
        self.steps += 1
        self.waited += waited
        self.total += waited + stepped
        if self.steps == WARMUP_STEPS:
            self._start = self.waited, self.total
        if self.steps != WARMUP_STEPS + JUDGED_STEPS:
            return None
        waited, total = self.waited - self._start[0], self.total - self._start[1]
        return self._advice(waited, total) if waited > LIMIT * total else None

    @property
    def share(self) -> float:
        """Share of the time so far that was spent on waiting."""
        return self.waited / max(self.total, 1e-9)

    def _advice(self, waited: float, total: float) -> str:
        if self.workers < self.spare:
            remedy = f"give --workers {min(self.spare, 2 * max(1, self.workers))} (now {self.workers})"
        else:
            remedy = "all cores are busy, so only more of them or a cheaper --strong help"
        later = " The gradient consistency, which joins later, makes this share smaller." if self.term_later else ""
        steps = f"steps {WARMUP_STEPS + 1} to {WARMUP_STEPS + JUDGED_STEPS}"
        return (
            f"note: the data loader is the bottleneck: {steps} waited "
            f"{1000 * waited / JUDGED_STEPS:.1f} ms of {1000 * total / JUDGED_STEPS:.1f} ms each for their images "
            f"({waited / total:.0%}), prepared by {self.workers or 'no'} worker processes: {remedy}.{later}"
        )


class ToModel:
    """Move uint8 `[N, H, W, 3]` images to the device as normalised floats `[N, 3, H, W]`."""

    def __init__(
        self, mean: list[float], deviation: list[float], device: torch.device, *, channels_last: bool = False
    ) -> None:
        self.mean, self.deviation, self.device, self.channels_last = mean, deviation, device, channels_last
        self.scale = (1 / (255 * torch.tensor(deviation, dtype=torch.float64))).float().to(device).view(1, 3, 1, 1)
        self.shift = (torch.tensor(mean, dtype=torch.float64) * 255).float().to(device).view(1, 3, 1, 1)

    def images(self, pixels: Tensor) -> Tensor:
        """Normalise images."""
        x = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        x = x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        return (x.float() - self.shift) * self.scale

    def batch(self, step: StepImages) -> SSLBatch:
        """Turn a batch's images into the batch that a method takes."""
        y, index = (part.to(self.device, non_blocking=True) for part in (step.y, step.indices))
        return SSLBatch(self.images(step.x), y, self.images(step.weak), self.images(step.strong), index)
