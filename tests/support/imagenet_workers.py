"""What single ranks do in the tests of the ImageNet trainer."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.config import Config
from trainer.errors import TrainerError
from trainer.loader import StepImages
from trainer.processes import join
from trainer.step import Trainer
from trainer.training import main, run


def train(rank: int, world: int, config: Config) -> int | tuple[str, str]:
    """The exit status, or the name and message of what was refused."""
    try:
        return run(config)
    except TrainerError as error:
        return type(error).__name__, str(error)


def train_elsewhere(rank: int, world: int, config: Config, folders: list[str]) -> int | tuple[str, str]:
    """Each rank with a data set of its own."""
    return train(rank, world, dataclasses.replace(config, data_dir=folders[rank]))


def train_forgetting(rank: int, world: int, config: Config) -> int | tuple[str, str]:
    """The random states of the checkpoint are not restored."""
    load = Trainer._load_random
    Trainer._load_random = lambda *_: None  # type: ignore[method-assign]
    try:
        return train(rank, world, config)
    finally:
        Trainer._load_random = load  # type: ignore[method-assign]


def train_with_nan(rank: int, world: int, config: Config) -> int | tuple[str, str]:
    """The last rank's images are not numbers from step 2 on."""
    forward = Trainer._forward

    def broken(self: Trainer, images: StepImages) -> Any:
        if self.step == 2 and rank == world - 1:
            self.to_model.shift = self.to_model.shift + torch.nan
        return forward(self, images)

    Trainer._forward = broken  # type: ignore[method-assign]
    try:
        return train(rank, world, config)
    finally:
        Trainer._forward = forward  # type: ignore[method-assign]


def stop_one(rank: int, world: int, config: Config) -> int | tuple[str, str]:
    """Rank 1 alone is to stop after two steps."""
    return train(rank, world, dataclasses.replace(config, stop_after_steps=2 if rank == 1 else None))


def collectives(rank: int, world: int) -> list[Any]:
    """What the functions of `Processes` give a rank."""
    here = join("cpu")
    tensor = torch.full((2,), float(rank))
    here.copy_from_first([tensor])
    mean = here.mean({"a": float(rank), "b": float("nan") if rank else 4.0, "c": float("nan")})
    return [
        here.share(6),
        here.sum([rank + 1.0, 2.0]),
        here.maximum(rank),
        {name: repr(value) for name, value in mean.items()},
        here.gather(torch.tensor([rank])).tolist(),
        tensor.tolist(),
        here.bytes_from_first(b"from first" if rank == 0 else b""),
        here.bytes_from_first(b""),
        here.on_first(lambda: {"rank": rank}),
        here.together(lambda: rank),
    ]


def train_killed(config: Config) -> None:
    """Rank 1 is killed before its fourth step; after torchrun has restarted all ranks, they train to the end."""
    torch.set_num_threads(1)
    step = Trainer.train_step

    def killed(self: Trainer, images: Any) -> None:
        if (self.step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (3, "1", "0"):
            Path(str(config.output), "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, images)

    Trainer.train_step = killed  # type: ignore[method-assign]
    sys.exit(main(config))
