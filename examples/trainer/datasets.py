"""Image classification data as uint8 tensors in memory, decoded once.

Index letters: N images, H and W their sides; images are `[N, H, W, 3]`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.config import Config
from trainer.errors import DatasetError
from trainer.folder import load_folder


@dataclass(frozen=True)
class Images:
    """A data set.

    Attributes:
        name: For tables and logs.
        classes: Class names, in label order.
        train_x: Training images, uint8 `[N, H, W, 3]`.
        train_y: Training labels, int64 `[N]`.
        test_x: Test images.
        test_y: Test labels.
        flip: Whether a mirrored image is of the same class (false for digits).
    """

    name: str
    classes: list[str]
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    flip: bool

    def digest(self) -> str:
        """SHA-256 of all pixels and labels."""
        digest = hashlib.sha256()
        for part in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(f"{tuple(part.shape)}".encode())
            digest.update(np.ascontiguousarray(part.numpy()).data)
        return digest.hexdigest()

    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel over the training images, in units of 255.

        Returns:
            Three means and three standard deviations (at least 1/255, so that a constant channel divides well).
        """
        # Exact: a histogram of 256 values per channel, so that neither order nor threads can change a digit.
        means, deviations = [], []
        for channel in range(3):
            counts = torch.bincount(self.train_x[..., channel].flatten().long(), minlength=256).double()
            values = torch.arange(256, dtype=torch.float64) / 255
            mean = (counts * values).sum() / counts.sum()
            variance = (counts * (values - mean) ** 2).sum() / counts.sum()
            means.append(float(mean))
            deviations.append(max(float(variance.sqrt()), 1 / 255))
        return means, deviations


def load_images(config: Config) -> Images:
    """Load the data set that the options name.

    Args:
        config: Resolved options.

    Returns:
        The images.

    Raises:
        DatasetError: Where the data are missing, unreadable, or not laid out as they should be.
    """
    if config.dataset == "digits":
        return _digits()
    if config.dataset == "folder":
        classes, train, test = load_folder(Path(config.data_dir), config.image_size)
        return Images(f"folder {Path(config.data_dir).name}", classes, *train, *test, flip=True)
    return _torchvision(config.dataset, Path(config.data_dir))


def _digits() -> Images:
    """Scikit-learn's 1797 handwritten digits, 8x8; a fixed fifth of each class is the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError("--dataset digits needs scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    x = torch.from_numpy(np.repeat(grey[..., None], 3, axis=-1))
    y = torch.from_numpy(bunch.target.astype(np.int64))
    # The file is ordered by writer; every fifth image of each class spreads the test set over all of them.
    rank = torch.zeros_like(y)
    for number in range(10):
        members = y == number
        rank[members] = torch.arange(int(members.sum()))
    test = rank % 5 == 4
    return Images("digits", [str(k) for k in range(10)], x[~test], y[~test], x[test], y[test], flip=False)


def _torchvision(name: str, folder: Path) -> Images:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise DatasetError(
            f"--dataset {name} needs a torchvision that matches the installed torch ({error}): "
            "pip install torch torchvision, both from the same release."
        ) from error
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        # torchvision unpacks the archive, and unpickles the batches in it, only where its MD5 of them holds.
        train, test = (kind(str(folder), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        damaged = f"; {kind.filename} there is not the published file" if (folder / kind.filename).exists() else ""
        raise DatasetError(
            f"--dataset {name} is neither in --data-dir {folder}{damaged} nor could it be downloaded ({error}). "
            f"On a machine with network, fetch {kind.url}, put {kind.filename} into {folder}, and start again."
        ) from error
    (train_x, train_y), (test_x, test_y) = (
        (torch.from_numpy(data.data), torch.tensor(data.targets)) for data in (train, test)
    )
    return Images(name, list(train.classes), train_x, train_y, test_x, test_y, flip=True)
