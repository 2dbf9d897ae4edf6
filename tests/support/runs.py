"""Runs of a trainer, and what finished or stopped ones left, to compare with others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import load_latest
from trainer.config import Config, resolve
from trainer.datasets import load_images
from trainer.loader import StepDataset, ToModel
from trainer.split import draw_split
from trainer.step import Trainer
from trainer.training import run

#: What the fixtures `tiny` and `photographs` give: `make("name", option=value)`.
MakeConfig = Callable[..., Config]


def trained(config: Config) -> Path:
    """The directory of a run, which ends well."""
    assert run(config) == 0
    return Path(str(config.output))


def stepped(config: Config, steps: int) -> tuple[Trainer, StepDataset]:
    """A trainer after some steps, without a directory, and the images of every step."""
    config = resolve(config)
    images = load_images(config)
    dataset = StepDataset(images, draw_split(images, config.labels, config.seed), config)
    to_model = ToModel(*images.channel_statistics, torch.device("cpu"), channels_last=config.channels_last)
    trainer = Trainer.fresh(config, len(images.classes), to_model, len(images.train_y))
    take(trainer, dataset, range(steps))
    return trainer, dataset


def take(trainer: Trainer, dataset: StepDataset, steps: Iterable[int]) -> None:
    """These steps."""
    for step in steps:
        trainer.train_step(lambda step=step: dataset[step])  # type: ignore[misc]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from leaves(item, f"{path}.{position}")
    else:
        yield path, value


def unequal(a: Any, b: Any) -> list[str]:
    """Where two nested values differ by a bit; NaN is NaN."""
    x, y = ({path: _bits(leaf) for path, leaf in leaves(value)} for value in (a, b))
    return [path for path in sorted(x.keys() | y.keys()) if x.get(path) != y.get(path)]


def _bits(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    return leaf.dtype, leaf.shape, leaf.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def final(folder: str | Path) -> dict[str, Any]:
    """The last checkpoint, flat, without what may differ: wall clock, and options that change no number."""
    loaded = load_latest(Path(folder) / "checkpoints")
    assert loaded is not None
    flat = dict(leaves(loaded))
    return {key: value for key, value in flat.items() if key != ".seconds" and not key.startswith(".options")}


def differing(a: str | Path, b: str | Path, least: int = 100) -> list[str]:
    """Names of everything that differs between two finished runs, which must have so many entries at least."""
    x, y = final(a), final(b)
    assert len(x) > least
    names = unequal(x, y)
    if (Path(a) / "metrics.jsonl").read_bytes() != (Path(b) / "metrics.jsonl").read_bytes():
        names.append("metrics.jsonl")
    return names


def option(key: str, value: Any) -> list[str]:
    name = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [name if value else name.replace("--", "--no-", 1)]
    return [name, str(value)]
