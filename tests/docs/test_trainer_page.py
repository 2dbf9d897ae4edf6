"""The pages on the trainers list every option with the default that it has."""

from __future__ import annotations

import dataclasses
import re

import pytest
from pages import ROOT

pytest.importorskip("tyro", reason="the trainers need the examples extra")
PAGE = ROOT / "docs" / "guides" / "trainer-options.md"


def _rows() -> dict[str, str]:
    """Option name to the cell that shows its default."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `--"):
            names, default, _ = (cell.strip() for cell in line.strip("|").split(" | ", 2))
            rows |= dict.fromkeys(re.findall(r"`--([a-z0-9-]+)`", names), default)
    return rows


def test_every_option_has_a_row() -> None:
    from trainer.config import Config

    assert set(_rows()) == {field.name.replace("_", "-") for field in dataclasses.fields(Config)} - {
        "recipe",
        "processes",
    }


def test_defaults_are_those_of_the_paper_preset() -> None:
    from trainer.config import preset_config

    for field, default in dataclasses.asdict(preset_config("paper")).items():
        if field in ("recipe", "processes"):  # no options
            continue
        shown = _rows()[field.replace("_", "-")]
        assert shown == ("none" if default is None else f"`{default}`"), field


def test_every_preset_has_a_row() -> None:
    from trainer.config import PRESETS

    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{preset}` | " in text for preset in PRESETS)


def test_the_defaults_of_methods_and_presets_are_those_of_the_trainer() -> None:
    from trainer.config import METHOD_DEFAULTS, PRESET_DEFAULTS, RAMP_SHARE

    columns = ("threshold", "temperature", "method_decay", "unlabeled_weight", "ramp", "unlabeled_ratio")
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0].strip("`"), len(cells)] = cells[1:]
    for method, values in METHOD_DEFAULTS.items():
        if method == "supervised":
            continue
        shown = dict(zip(columns, rows[method, 9], strict=False))
        for name in ("threshold", "temperature", "method_decay", "unlabeled_weight"):
            assert shown[name].replace("adaptive", "") == (f"{values[name]:g}" if name in values else ""), method
        assert shown["unlabeled_ratio"] == str(values.get("unlabeled_ratio", "preset")), method
        assert ("40 % of the run" in shown["ramp"]) == (values.get("unlabeled_ramp") == RAMP_SHARE), method
        assert rows[method, 9][6] == {True: "yes", False: "no", None: ""}[values.get("joint_forward")], method
        assert rows[method, 9][7].startswith("`weak`" if values.get("strong") == "weak" else "preset"), method
    for preset, values in PRESET_DEFAULTS.items():
        ramp, ratio, strong = rows[preset, 4]
        assert ramp == (f"{values['unlabeled_ramp']:,} steps" if values["unlabeled_ramp"] else "none")
        assert (ratio, strong) == (str(values["unlabeled_ratio"]), f"`{values['strong']}`")


def test_the_page_on_imagenet_has_every_default_that_differs() -> None:
    from trainer.config import IMAGENET, Config

    rows = {}
    for line in PAGE.with_name("imagenet.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `--") and len(cells) == 3 and re.fullmatch(r"`--[a-z-]+`", cells[0]):
            rows.setdefault(cells[0].strip("`-").replace("-", "_"), cells[1])
    theirs = dataclasses.asdict(IMAGENET["paper"])
    different = {name: value for name, value in theirs.items() if value != getattr(Config(), name)}
    assert different.pop("recipe") == "imagenet"
    assert rows == {name: f"`{value}`" for name, value in different.items()}
