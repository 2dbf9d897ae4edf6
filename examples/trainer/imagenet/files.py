"""The files of a folder data set, decoded when they are needed.

Names are kept in one array of bytes per part: a million Python strings in every loader worker would be copied there,
because counting references writes to their memory.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.errors import DatasetError
from trainer.files import regular_size
from trainer.folder import list_folder


class Photographs:
    """One part of a data set, `FOLDER/CLASS/NAME`.

    Args:
        folder: The part's folder.
        classes: Class names, in label order.
        names: File names of each class.

    Attributes:
        y: Labels int64 `[N]`.
    """

    def __init__(self, folder: Path, classes: list[str], names: list[list[str]]) -> None:
        self.folder, self.classes = str(folder), classes
        self.names = np.array([os.fsencode(name) for members in names for name in members])
        self.y = torch.repeat_interleave(torch.tensor([len(members) for members in names]))

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """File name below the class's folder."""
        return os.fsdecode(self.names[index])

    def path(self, index: int) -> str:
        """Path of a photograph."""
        return os.path.join(self.folder, self.classes[int(self.y[index])], self.name(index))

    def read(self, index: int) -> Image.Image:
        """Decode a photograph.

        Args:
            index: Which.

        Returns:
            It, in RGB.

        Raises:
            DatasetError: The file is missing or no image.
        """
        path = self.path(index)
        try:
            regular_size(Path(path))
            with Image.open(path) as opened:
                return opened.convert("RGB")
        except Exception as error:  # a damaged file can fail anywhere in its format's decoder, and with any class
            raise DatasetError(f"{path} cannot be read as an image ({error}): replace or remove it.") from error

    def digest(self) -> bytes:
        """SHA-256 of class names, file names and file sizes; the pixels are not read."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for index in range(len(self)):
            digest.update(self.names[index] + f" {self.y[index]} {os.path.getsize(self.path(index))}\n".encode())
        return digest.digest()


class PhotographFolder:
    """Training and test photographs below one folder.

    Args:
        root: Holds `train/` and `val/` (or `test/`), each with one directory per class.

    Attributes:
        name: For tables and logs.
        classes: Class names, in label order.
        train: Training photographs.
        test: Those of `val/`, or `test/`.

    Raises:
        DatasetError: Wrong layout, class sets that differ, or a class without images.
    """

    def __init__(self, root: Path) -> None:
        listing = list_folder(root)
        self.name, self.classes = f"folder {root.name}", listing.classes
        self.train = Photographs(listing.train, self.classes, listing.train_names)
        self.test = Photographs(listing.test, self.classes, listing.test_names)

    @property
    def train_y(self) -> Tensor:
        """Training labels, int64 `[N]`."""
        return self.train.y

    def digest(self) -> str:
        """SHA-256 of the names and sizes of all files."""
        return hashlib.sha256(self.train.digest() + self.test.digest()).hexdigest()
