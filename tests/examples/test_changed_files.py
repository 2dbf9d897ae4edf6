"""A run notices files that are others than those it began with, whatever their sizes and dates, on both feeds."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from support.pictures import MakeFolder
from support.runs import MakeConfig, differing
from trainer.errors import ResumeError
from trainer.files import json_lines
from trainer.training import run


def _swap(first: Path, second: Path) -> None:
    """Exchange two files as `mv` does; their dates go with them."""
    first.rename(first.with_suffix(".old"))
    second.rename(first)
    first.with_suffix(".old").rename(second)


def _overwrite(first: Path, second: Path) -> None:
    """Replace the bytes of a file, but not its date."""
    times = first.stat()
    first.write_bytes(second.read_bytes())
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))


def _exchange_classes(first: Path, second: Path) -> None:
    _swap(first.parent, second.parent)


@pytest.fixture
def alike(photo_folder: MakeFolder) -> Path:
    """A data set of 20 files of one size and one date."""
    root = photo_folder(train={"ant": 6, "bee": 6}, test={"ant": 2, "bee": 2}, unlabeled={"": 4})
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path.with_suffix(".bmp"))
        os.utime(path.with_suffix(".bmp"), (1e9, 1e9))
        path.unlink()
    return root


@pytest.fixture
def mine(alike: Path, tiny: MakeConfig) -> MakeConfig:
    """Options of a run on it."""
    places: dict[str, Any] = {"dataset": "folder", "data_dir": str(alike), "labels": "all", "image_size": 8}
    return lambda name="run", **changes: tiny(name, **{**places, "strong": "weak", "method": "supervised", **changes})


@pytest.mark.parametrize("feed", ["memory", "stream"])
@pytest.mark.parametrize("change", [_swap, _overwrite, _exchange_classes])
def test_files_of_one_size_that_are_others_now_are_noticed(
    alike: Path, mine: MakeConfig, feed: str, change: Callable[[Path, Path], None]
) -> None:
    config = mine(feed=feed, stop_after_steps=1)
    assert run(config) == 0
    change(alike / "train" / "ant" / "000.bmp", alike / "train" / "bee" / "000.bmp")
    with pytest.raises(ResumeError, match=r"files? (is|are) changed \(train/ant/000\.bmp"):
        run(config)
    if change is _exchange_classes:  # no labeled image is left
        return
    record = Path(str(config.output), "left_out.jsonl")
    assert run(dataclasses.replace(config, stop_after_steps=None, skip_damaged=True)) == 0
    assert "train/ant/000.bmp" in {line["file"] for line in json_lines(record)}


@pytest.mark.parametrize("check", [None, True, False])
def test_a_copied_stream_goes_on_and_files_that_were_never_read_are_said(
    alike: Path, mine: MakeConfig, check: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, config = (mine(name, feed="stream", check_images=check) for name in ("whole", "parts"))
    assert run(whole) == 0
    assert run(dataclasses.replace(config, stop_after_steps=1)) == 0
    capsys.readouterr()
    assert run(dataclasses.replace(config, stop_after_steps=1)) == 0
    said = capsys.readouterr().err
    assert "other dates" not in said
    assert ("checked" in said) == (check is True)  # dates and inodes are enough
    shutil.copytree(alike, alike.parent / "copy")
    assert run(dataclasses.replace(config, data_dir=str(alike.parent / "copy"))) == 0
    said = capsys.readouterr().err
    assert ("note: 20 files of their old sizes have other dates" in said) == (check is False)
    assert ("checked 20 of 20 images" in said) == (check is not False)
    assert differing(str(whole.output), str(config.output)) == []
