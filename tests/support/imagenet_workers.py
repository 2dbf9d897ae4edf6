"""What single ranks do in the tests of the ImageNet trainer, and, run by torchrun, a trainer whose rank 1 is killed."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from typing import Any

import torch

from trainer.errors import TrainerError
from trainer.imagenet.config import ImageNetConfig
from trainer.imagenet.step import ProcessTrainer
from trainer.imagenet.training import main, run
from trainer.loader import StepImages
from trainer.processes import join


def train(rank: int, world: int, config: ImageNetConfig) -> int | tuple[str, str]:
    """The exit status, or the name and message of what was refused."""
    try:
        return run(config)
    except TrainerError as error:
        return type(error).__name__, str(error)


def train_elsewhere(rank: int, world: int, config: ImageNetConfig, folders: list[str]) -> int | tuple[str, str]:
    """Each rank with a data set of its own."""
    return train(rank, world, dataclasses.replace(config, data_dir=folders[rank]))


def train_forgetting(rank: int, world: int, config: ImageNetConfig) -> int | tuple[str, str]:
    """The random states of the checkpoint are not restored."""
    load = ProcessTrainer._load_random
    ProcessTrainer._load_random = lambda *_: None  # type: ignore[method-assign]
    try:
        return train(rank, world, config)
    finally:
        ProcessTrainer._load_random = load  # type: ignore[method-assign]


def train_with_nan(rank: int, world: int, config: ImageNetConfig) -> int | tuple[str, str]:
    """The last rank's images are not numbers from step 2 on."""
    forward = ProcessTrainer._forward

    def broken(self: ProcessTrainer, images: StepImages) -> Any:
        if self.step == 2 and rank == world - 1:
            self.to_model.shift = self.to_model.shift + torch.nan
        return forward(self, images)

    ProcessTrainer._forward = broken  # type: ignore[method-assign]
    try:
        return train(rank, world, config)
    finally:
        ProcessTrainer._forward = forward  # type: ignore[method-assign]


def stop_one(rank: int, world: int, config: ImageNetConfig) -> int | tuple[str, str]:
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


if __name__ == "__main__":
    from trainer.cli import parse_options
    from trainer.imagenet.config import PRESETS

    step = ProcessTrainer.train_step

    def killed(self: ProcessTrainer, images: Any) -> None:
        if (self.step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (3, "1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, images)

    ProcessTrainer.train_step = killed  # type: ignore[method-assign]
    sys.exit(main(parse_options(sys.argv[1:], PRESETS, program="killed", description="")))
