"""The parts of `hostile_files.py` about data sets: forged archives, damaged images and folders."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from hostile_checkpoints import Case, begun, copied
from hostile_runs import refusal
from PIL import Image
from victims import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from support import forgeries
from support.pictures import draw_folder


def archives(work: Path, quick: bool) -> Iterator[Case]:
    def tree() -> dict[str, str]:
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(work.rglob("*"))
        }

    outside, folder = work / "outside", work / "data"
    outside.mkdir()
    folder.mkdir()
    with mock.patch.object(urllib.request, "urlopen", side_effect=OSError("no network")):
        for name, forge in forgeries.ARCHIVES.items():
            (folder / "cifar-10-python.tar.gz").write_bytes(forge(outside))
            before = tree()
            answer = refusal(work / "run", "is not the published file", dataset="cifar10", data_dir=str(folder))
            yield "forged archives", name, answer if tree() == before else "something was written"
        (folder / "cifar-10-python.tar.gz").unlink()
        batches = folder / "cifar-10-batches-py"
        batches.mkdir()
        for name in ("os.system in a bare pickle", "INST", "OBJ"):
            for part in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
                (batches / part).write_bytes(forgeries.PICKLES[name](outside / "canary"))
            answer = refusal(work / "run", "is neither in --data-dir", dataset="cifar10", data_dir=str(folder))
            yield "forged batches", name, answer if not any(outside.iterdir()) else "it ran"


def data(work: Path, quick: bool) -> Iterator[Case]:
    whole = work / "whole"
    parts = {part: dict.fromkeys(("ant", "bee"), count) for part, count in (("train", 12), ("test", 2))}
    draw_folder(whole, parts, size=(16, 16), name="{number:02d}.jpg", quality=95)
    options = {"dataset": "folder", "labels": 4}
    stopped = begun(work / "stopped", data_dir=str(whole), **options)
    root, image, third, more = work / "photos", "train/ant/01.jpg", "train/cat/new.jpg", "train/ant/new.jpg"

    def case(row: str, name: str, change: Callable[[Path], object], words: str, run: str = "new") -> Case:
        copied(whole, root)
        change(root)
        shutil.rmtree(work / run, ignore_errors=True)  # of a case that was taken
        return row, name, refusal(copied(stopped, work / "old") if run == "old" else work / run, words,
                                  data_dir=str(root), **options)  # fmt: skip

    unreadable = "cannot be read as an image"
    content = (whole / image).read_bytes()
    cuts = range(0, len(content) - 2, len(content) // (4 if quick else 40))
    for cut in cuts:
        yield case(
            "image, cut", f"{cut} bytes", lambda root, cut=cut: (root / image).write_bytes(content[:cut]), unreadable
        )

    def swap(path: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
        def change(root: Path) -> None:
            (root / path).unlink(missing_ok=True)
            make(root / path)

        return change

    yield case("image", "text", lambda root: (root / image).write_text("no image"), unreadable)
    yield case("image", "a link to itself", swap(image, lambda path: path.symlink_to(path)), unreadable)
    yield case("image", "a link to nowhere", swap(image, lambda path: path.symlink_to("nowhere")), unreadable)
    yield case("image", "a pipe", swap(image, os.mkfifo), unreadable)
    yield case("image", "endless", swap(image, _zeros), unreadable)
    row, name, answer = case("image", "a folder", swap(image, os.mkdir), told := "empty folders named like an image")
    yield row, name, "ok: left out, and told" if told in answer else answer
    yield case(
        "image", "another size", swap(image, lambda path: Image.new("RGB", (9, 9)).save(path)), "give --image-size"
    )
    yield case("image", "50,000 pixels a side", swap(image, _enormous), unreadable)
    yield case("folder", "a class more in train", lambda root: _photo(root / third), "only in train: ['cat']")
    yield case(
        "folder", "a class less in test", lambda root: shutil.rmtree(root / "test" / "bee"), "only in train: ['bee']"
    )
    yield case("folder", "a class that is empty", lambda root: (root / third).parent.mkdir(), "holds no image")
    yield case("folder", "no train", lambda root: shutil.rmtree(root / "train"), "expected --data-dir to hold")
    yield case(
        "folder", "train a file", lambda root: (shutil.rmtree(root / "train"), (root / "train").touch()), "expected"
    )
    yield case("folder", "train a link to itself", lambda root: _loop(root / "train"), "expected --data-dir to hold")
    changed = "differs from the data set that the run"
    yield case("since the run began", "an image gone", swap(image, lambda _: None), "differs from the data set", "old")
    yield case("since the run began", "an image more", lambda root: _photo(root / more), "differs", "old")
    yield case("since the run began", "a class moved", _move, "differs", "old")
    for bit in range(8 * 700, 8 * len(content), 8 * (100 if quick else 7)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 16
        yield case(
            "image, a bit since the run began", f"bit {bit}",
            lambda root, flipped=flipped: (root / image).write_bytes(bytes(flipped)), changed, "old",
        )  # fmt: skip


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _enormous(path: Path) -> None:
    """A JPEG whose header claims 50,000 x 50,000 pixels."""
    Image.new("RGB", (16, 16)).save(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = (50_000).to_bytes(2, "big") * 2
    path.write_bytes(bytes(content))


def _photo(path: Path, side: int = 16) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (side, side), (9, 9, 9)).save(path)


def _loop(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path)


def _move(root: Path) -> None:
    (root / "train/ant/01.jpg").rename(root / "train/bee/moved.jpg")
