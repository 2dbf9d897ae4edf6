"""The page on the trainer lists every option with the default that it has."""

from __future__ import annotations

import dataclasses
import re

import pytest
from pages import ROOT

pytest.importorskip("tyro", reason="the trainers need the examples extra")
PAGE = ROOT / "docs" / "guides" / "trainer.md"


def _rows() -> dict[str, str]:
    """Option name to the cell that shows its default."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `--"):
            names, default, _ = (cell.strip() for cell in line.strip("|").split(" | ", 2))
            rows |= dict.fromkeys(re.findall(r"`--([a-z-]+)`", names), default)
    return rows


def test_every_option_has_a_row() -> None:
    from recipes.config import Config

    assert set(_rows()) == {field.name.replace("_", "-") for field in dataclasses.fields(Config)}


def test_defaults_are_those_of_the_paper_preset() -> None:
    from recipes.config import preset_config

    for field, default in dataclasses.asdict(preset_config("paper")).items():
        shown = _rows()[field.replace("_", "-")]
        assert shown == ("none" if default is None else f"`{default}`"), field


def test_every_preset_has_a_row() -> None:
    from recipes.config import PRESETS

    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{preset}` | " in text for preset in PRESETS)
