"""benchmarks/evidence/search_settings.py: goes on where it was interrupted, and refuses what it did not write."""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pages import program

TWO = ["0.3 of the other gradients' norm", "weight 0.3, labels alone, their own two views"]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, with a clock by which every run takes a second."""
    found = program("benchmarks/evidence/search_settings")
    monkeypatch.setattr("time.process_time", itertools.count(1.0).__next__)
    return found


def call(module: ModuleType, output: Path, *options: str, only: list[str] = TWO) -> Any:
    sizes = ["--steps", "4", "--seeds", "2", "--fresh", "2"]
    module.main(["--preset", "search", "--output", str(output), *sizes, *options, "--only", *only])
    return json.loads(output.read_text())


def test_an_interrupted_search_ends_in_the_same_file(
    search: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is replaced by a number that follows from setting, seed and steps."""

    def trained(_images: Any, *arguments: Any) -> tuple[float, float]:
        return zlib.crc32(repr(arguments).encode()) / 2**32, 1.0

    monkeypatch.setattr(search, "train", trained)
    monkeypatch.setattr(search, "accuracy", lambda images, number, part: number)
    whole = call(search, tmp_path / "whole.json")
    calls = itertools.count(1)

    def interrupted(*arguments: Any) -> Any:
        if next(calls) in (4, 11):  # in the search, and on the test images
            raise KeyboardInterrupt
        return trained(*arguments)

    monkeypatch.setattr(search, "train", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            call(search, tmp_path / "parts.json")
    assert call(search, tmp_path / "parts.json") == whole
    runs = sum(len(seeds) for rows in whole["runs"].values() for seeds in rows.values())
    assert next(calls) - 1 == runs + 2  # nothing was trained twice
    assert call(search, tmp_path / "parts.json") == whole

    assert whole["tried"] == 2
    assert all(len(seeds) == 2 for rows in whole["runs"].values() for seeds in rows.values())
    assert {name for name in whole["runs"]["confirm"] if ", as long as " not in name} == set(whole["runs"]["search"])
    own_views = next(row for row in whole["summary"] if row["name"] == TWO[1])
    assert own_views["base"] == "labels alone, 40 labels"
    accuracies = {name: [run[0] for run in seeds.values()] for name, seeds in whole["runs"]["search"].items()}
    gap = sum(accuracies[TWO[1]]) / 2 - sum(accuracies["labels alone, 40 labels"]) / 2
    assert own_views["minus_base"]["mean"] == pytest.approx(100 * gap)


def test_a_foreign_file_is_refused(search: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    made = call(search, output, only=TWO[1:])
    with pytest.raises(SystemExit, match=r"made with another names, steps: give another file"):
        call(search, output, "--steps", "5")
    output.write_text(json.dumps(made | {"identity": made["identity"] | {"program": "older"}}))
    with pytest.raises(SystemExit, match="made with another program"):
        call(search, output, only=TWO[1:])
    output.write_text(json.dumps({"rows": []}))
    with pytest.raises(SystemExit, match="is no result file of this program"):
        call(search, output, only=TWO[1:])
    assert json.loads(output.read_text()) == {"rows": []}
