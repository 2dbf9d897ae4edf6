"""The page on the ImageNet trainer lists the options that it has of its own, with their defaults."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest
from pages import ROOT

pytest.importorskip("tyro", reason="the trainers need the examples extra")
PAGE = ROOT / "docs" / "guides" / "imagenet.md"


def _own() -> dict[str, object]:
    """Options that the trainer defines itself, with the defaults of the paper preset."""
    from trainer.imagenet.config import ImageNetConfig

    shown = {
        name for name in ImageNetConfig.__annotations__ if "Suppress" not in str(ImageNetConfig.__annotations__[name])
    }
    return {field.name: field.default for field in dataclasses.fields(ImageNetConfig) if field.name in shown}


def test_the_table_has_the_options_of_its_own() -> None:
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `--") and len(cells) == 3 and re.fullmatch(r"`--[a-z-]+`", cells[0]):
            rows.setdefault(cells[0].strip("`-").replace("-", "_"), cells[1])
    assert rows == {name: "none" if value is None else f"`{value}`" for name, value in _own().items()}


def test_options_that_do_nothing_here_are_hidden() -> None:
    """What the ImageNet trainer takes over from the CIFAR one must have an effect in it: add it here when it has."""
    from trainer.imagenet.config import ImageNetConfig

    from trainer.config import Config

    hints = typing.get_type_hints(ImageNetConfig, include_extras=True)
    hidden = {name for name, hint in hints.items() if "Suppress" in repr(hint)}
    inherited = {field.name for field in dataclasses.fields(Config)} - set(ImageNetConfig.__annotations__)
    assert inherited - hidden == {
        "config", "output", "seed", "device", "workers", "method", "threshold", "temperature", "method_decay",
        "unlabeled_weight", "unlabeled_ramp", "brier_weight", "joint_forward", "ggcr_weight", "ggcr_warmup",
        "ggcr_ramp", "ggcr_every", "ggcr_engine", "ggcr_projection", "ggcr_gate", "ggcr_criterion",
        "ggcr_stop_gradient", "steps",
        "unlabeled_ratio", "ema", "ema_warmup", "amp", "channels_last", "log_every", "tensorboard", "progress",
        "resume", "stop_after_steps", "stop_after_minutes",
    }  # fmt: skip
