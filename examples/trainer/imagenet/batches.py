"""A process's part of step k's batch: a pure function of (files, split, options, seed, k) and the process's rank.

Every view has a seed that follows from the run's seed, the step, the view's kind and the place in the *global* batch.
So neither workers nor the number of processes change an image.

Index letters: B labeled images of a step over all processes, U = ratio * B unlabeled ones, W processes, S side.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainer.imagenet.config import ImageNetConfig
from trainer.imagenet.files import Photographs
from trainer.imagenet.views import View, render, strong_view, weak_view
from trainer.loader import StepImages, spare_cores
from trainer.processes import Processes
from trainer.split import Split
from trainer.streams import EndlessOrder, Stream, raw


class StepPhotographs(Dataset[StepImages]):
    """Maps a step number to this process's images of that step.

    Args:
        train: The training photographs.
        split: Which of them are labeled.
        config: Resolved options.
        processes: Which part to make.
    """

    def __init__(self, train: Photographs, split: Split, config: ImageNetConfig, processes: Processes) -> None:
        self.train, self.labeled, self.seed, self.size = train, split.labeled, config.seed, config.image_size
        self.batch = config.batch_size
        self.unlabeled_batch = 0 if config.method == "supervised" else self.batch * int(config.unlabeled_ratio or 0)
        self.mine = processes.share(self.batch), processes.share(self.unlabeled_batch)
        self.weak = weak_view(config.image_size, config.crop_scale)
        self.strong = strong_view(str(config.strong), config.image_size, config.crop_scale)
        self.labeled_order = EndlessOrder(config.seed, Stream.LABELED_ORDER, len(split.labeled))
        self.unlabeled_order = EndlessOrder(config.seed, Stream.UNLABELED_ORDER, len(train))

    def __getitem__(self, step: int) -> StepImages:
        """Build this process's images of a step."""
        labeled = self.labeled[torch.from_numpy(self.labeled_order.draws(step * self.batch, self.batch))[self.mine[0]]]
        seeds = self._seeds(Stream.LABELED_VIEW, step, self.batch)[self.mine[0]]
        x = self._views([(index, [(self.weak, seed)]) for index, seed in zip(labeled.tolist(), seeds, strict=True)], 1)
        number, mine = self.unlabeled_batch, self.mine[1]
        index = torch.from_numpy(self.unlabeled_order.draws(step * number, number))[mine]
        weak = self._seeds(Stream.WEAK_VIEW, step, number)[mine]
        strong = self._seeds(Stream.STRONG_VIEW, step, number)[mine]
        wanted = [(i, [(self.weak, w), (self.strong, s)]) for i, w, s in zip(index.tolist(), weak, strong, strict=True)]
        pairs = self._views(wanted, 2)
        return StepImages(x[0], self.train.y[labeled], pairs[0], pairs[1], index, self.train.y[index])

    def _seeds(self, stream: Stream, step: int, count: int) -> list[int]:
        """Seeds of the views of the whole batch, below 2^63."""
        return [int(draw) for draw in raw(self.seed, stream, step, count) >> np.uint64(1)]

    def _views(self, wanted: list[tuple[int, list[tuple[View, int]]]], views: int) -> list[Tensor]:
        """Each photograph decoded once, `views` uint8 tensors `[N, S, S, 3]`."""
        out = np.empty((views, len(wanted), self.size, self.size, 3), dtype=np.uint8)
        for position, (index, kinds) in enumerate(wanted):
            image = self.train.read(index)
            for number, (view, seed) in enumerate(kinds):
                out[number, position] = render(view, image, seed)
        return list(torch.from_numpy(out))


def worker_count(workers: int | None, local_world: int) -> int:
    """Settle `--workers` for each process: as given, else the machine's cores shared out, eight at most."""
    return min(8, max(0, spare_cores_each(local_world))) if workers is None else workers


def spare_cores_each(local_world: int) -> int:
    """Cores that each of a machine's training processes leaves over, of those that it may run on."""
    return (spare_cores() + 1) // local_world - 1
