"""The page on the ImageNet trainer lists the options that it has of its own, with their defaults."""

from __future__ import annotations

import dataclasses
import re

import pytest
from pages import ROOT

pytest.importorskip("tyro", reason="the trainers need the examples extra")
PAGE = ROOT / "docs" / "guides" / "imagenet.md"


def test_the_table_has_every_default_that_differs() -> None:
    from trainer.config import IMAGENET, Config

    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `--") and len(cells) == 3 and re.fullmatch(r"`--[a-z-]+`", cells[0]):
            rows.setdefault(cells[0].strip("`-").replace("-", "_"), cells[1])
    theirs = dataclasses.asdict(IMAGENET["paper"])
    different = {name: value for name, value in theirs.items() if value != getattr(Config(), name)}
    assert different.pop("recipe") == "imagenet"
    assert rows == {name: f"`{value}`" for name, value in different.items()}
