"""Images from folders, one directory per class: ROOT/train/CLASS/*.png and ROOT/test/CLASS/*.png (or ROOT/val)."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.errors import DatasetError
from trainer.files import regular_size

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff"})
LabeledImages = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Listing:
    """The files of a folder data set, in label order and then by name.

    Attributes:
        classes: Class names in alphabetical order.
        train: `ROOT/train`.
        test: `ROOT/test` or `ROOT/val`.
        train_names: File names of each class below `train`.
        test_names: File names of each class below `test`.
    """

    classes: list[str]
    train: Path
    test: Path
    train_names: list[list[str]]
    test_names: list[list[str]]


def load_folder(root: Path, image_size: int | None) -> tuple[list[str], LabeledImages, LabeledImages]:
    """Decode a folder data set into memory.

    Args:
        root: Holds `train/` and `test/` (or `val/`), each with one directory per class.
        image_size: Side to resize (shorter side) and centre-crop to; None: all images must have one size.

    Returns:
        Class names in alphabetical order, then images uint8 `[N, H, W, 3]` and labels int64 `[N]` of the
        training part and of the test part.

    Raises:
        DatasetError: Wrong layout, class sets that differ, an unreadable image, or sizes that differ.
    """
    found = list_folder(root)
    parts = ((found.train, found.train_names), (found.test, found.test_names))
    files = [
        [(part / found.classes[label] / name, label) for label, members in enumerate(names) for name in members]
        for part, names in parts
    ]
    reader = _Reader(image_size, sum(len(part) for part in files))
    return found.classes, reader.read(files[0]), reader.read(files[1])


def list_folder(root: Path) -> Listing:
    """List a folder data set without opening an image.

    Args:
        root: As for `load_folder`.

    Returns:
        The files.

    Raises:
        DatasetError: Wrong layout, class sets that differ, or a class without images.
    """
    layout = "expected --data-dir to hold train/CLASS/IMAGE and test/CLASS/IMAGE (or val/ instead of test/)"
    if not root.is_dir():
        raise DatasetError(f"--data-dir {root} is not a directory: {layout}.")
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise DatasetError(f"--data-dir {root} holds {found}: {layout}.")
    classes, test_classes = _class_names(train), _class_names(test)
    if classes != test_classes:
        only_train = sorted(set(classes) - set(test_classes))
        only_test = sorted(set(test_classes) - set(classes))
        raise DatasetError(
            f"{train} and {test} must have the same class directories: "
            f"only in {train.name}: {only_train or 'none'}; only in {test.name}: {only_test or 'none'}."
        )
    if len(classes) < 2:
        raise DatasetError(f"{train} has {len(classes)} class directories; a classifier needs at least two.")
    return Listing(classes, train, test, _names(train, classes), _names(test, classes))


def _class_names(part: Path) -> list[str]:
    return sorted(entry.name for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _names(part: Path, classes: list[str]) -> list[list[str]]:
    names = []
    for name in classes:
        members = sorted(entry for entry in os.listdir(part / name) if Path(entry).suffix.lower() in SUFFIXES)
        if not members:
            raise DatasetError(
                f"{part / name} holds no image ({', '.join(sorted(SUFFIXES))}): add images or remove the class."
            )
        names.append(members)
    return names


class _Reader:
    """Decodes files of one common size, with a line of progress every few seconds."""

    def __init__(self, image_size: int | None, total: int) -> None:
        self.image_size, self.total, self.done = image_size, total, 0
        self.size: tuple[int, int] | None = None  # of the first image; all others must agree
        self.first: Path | None = None
        self.said = time.monotonic()

    def read(self, files: list[tuple[Path, int]]) -> LabeledImages:
        images: np.ndarray | None = None
        for position, (path, _) in enumerate(files):
            pixels = self._decode(path)
            if images is None:  # one allocation for all: no second copy while stacking
                images = np.empty((len(files), *pixels.shape), dtype=np.uint8)
            images[position] = pixels
            self._report()
        labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        return torch.from_numpy(images), labels

    def _decode(self, path: Path) -> np.ndarray:
        try:
            regular_size(path)
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except Exception as error:  # a damaged file can fail anywhere in its format's decoder, and with any class
            raise DatasetError(f"{path} cannot be read as an image ({error}): replace or remove it.") from error
        if self.image_size is not None:
            image = _resize_and_crop(image, self.image_size)
        if self.size is None:
            self.size, self.first = image.size, path
        elif image.size != self.size:
            raise DatasetError(
                f"{path} is {image.size[0]}x{image.size[1]}, but {self.first} is {self.size[0]}x{self.size[1]}: "
                "give --image-size SIDE to resize and centre-crop every image to one size."
            )
        return np.asarray(image)

    def _report(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.said > 3 or self.done == self.total:
            self.said = now
            print(f"decoded {self.done:,} of {self.total:,} images", file=sys.stderr, flush=True)


def _resize_and_crop(image: Image.Image, side: int) -> Image.Image:
    """Scale the shorter side to `side`, then cut the centre square."""
    width, height = image.size
    scale = side / min(width, height)
    width, height = max(side, round(width * scale)), max(side, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))
