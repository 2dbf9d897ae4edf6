"""Image classification data: `Images` decoded once into memory, or `Photographs` read from disk when needed.

Index letters: N images, H and W their sides; images are `[N, H, W, 3]`.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.config import Config
from trainer.errors import DatasetError, ResumeError
from trainer.folder import NO_LABEL, FileRecord, Files, Listing, Manifest, decode, list_folder, twins
from trainer.images import CHECK_SECONDS, damaged, for_each, read_image

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # its channels' mean and deviation, as torchvision has them


@dataclass(frozen=True)
class Images:
    """A data set in memory."""

    name: str  # For tables and logs.
    classes: list[str]  # Class names, in label order.
    train_x: Tensor  # Training images, uint8 `[N, H, W, 3]`.
    train_y: Tensor  # Training labels, int64 `[N]`; `NO_LABEL` where there is none.
    test_x: Tensor  # Test images.
    test_y: Tensor  # Test labels.
    flip: bool  # Whether a mirrored image is of the same class (false for digits).
    files: FileRecord | None = None  # Where they are from, for a folder.

    def digest(self) -> str:
        """SHA-256 of all pixels and labels."""
        if self.files is not None:
            return self.files.digest()
        digest = hashlib.sha256()
        for part in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(f"{tuple(part.shape)}".encode())
            digest.update(np.ascontiguousarray(part.numpy()).data)
        return digest.hexdigest()

    @functools.cached_property
    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel over the training images, in units of 255; no deviation is below 1/255."""
        # Exact: a histogram of 256 values per channel, so that neither order nor threads can change a digit.
        means, deviations = [], []
        for channel in range(3):
            parts = (images[..., channel].flatten() for images in self.train_x.split(1000))  # a copy of few at a time
            counts = torch.stack([torch.bincount(part, minlength=256) for part in parts]).sum(0).double()
            values = torch.arange(256, dtype=torch.float64) / 255
            mean = (counts * values).sum() / counts.sum()
            variance = (counts * (values - mean) ** 2).sum() / counts.sum()
            means.append(float(mean))
            deviations.append(max(float(variance.sqrt()), 1 / 255))
        return means, deviations


class Photographs:
    """One part of a folder data set, decoded when needed.

    Names are kept in one array of bytes: a million Python strings in every loader worker would be copied there, because
    counting references writes to their memory.
    """

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = str(root), np.array([os.fsencode(name) for name in names], dtype=bytes)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path below the data set's folder."""
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> Image.Image:
        """Decode a photograph, as `read_image` does."""
        return read_image(Path(self.root, self.name(index)))


@dataclass(frozen=True)
class PhotographFolder:
    """A folder data set that stays on disk."""

    name: str  # For tables and logs.
    classes: list[str]  # Class names, in label order.
    train: Photographs  # Training photographs.
    train_y: Tensor  # Their labels, int64 `[N]`; `NO_LABEL` where there is none.
    test: Photographs  # Test photographs.
    test_y: Tensor  # Test labels.
    files: FileRecord  # What is known of them.
    flip: bool = True

    def digest(self) -> str:
        """SHA-256 of the names, labels and sizes of all files."""
        return self.files.digest()

    @property
    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """ImageNet's: those of the photographs would need a pass over all of them."""
        return IMAGENET


DataSet = Images | PhotographFolder


def load_images(config: Config, before: FileRecord | None = None) -> DataSet:
    """Load or list the data set that the options name."""
    if config.dataset == "digits":
        return _digits()
    if config.dataset != "folder":
        return _torchvision(config.dataset, Path(config.data_dir))
    return _folder(config, before)


def _folder(config: Config, before: FileRecord | None) -> DataSet:
    root, in_memory = Path(config.data_dir), config.feed == "memory"
    listing = list_folder(root)
    left_out, lost = (dict(before.left_out), dict(before.reasons)) if before else ({}, {})
    train, test = (part.without(set(left_out)) for part in (listing.train, listing.test))
    if before is not None and before.manifest:
        train, test, absent = _as_before(config, before, train, test)
        lost |= absent
    names = train.names + test.names
    pixels, stamps, digests = torch.empty(0), dict[str, tuple[str, str]](), dict[str, str]()
    if in_memory:
        pixels, found = decode(root, names, config.image_size, lost)
        bad = {names[index]: reason for index, reason in found.items()}
    else:
        stamps = {name: _stamp(root / name) for name in names if name not in lost}
        bad, digests = _check(config, root, stamps, before)
    if bad and not config.skip_damaged:
        raise damaged(bad)
    if before is None:
        left_out |= bad
        kept = torch.tensor([name not in bad for name in names])
        pixels = pixels[kept] if in_memory and bad else pixels
        train, test = _without(listing, bad)
        names = train.names + test.names
    else:
        lost |= bad
    labels = train.labels + test.labels
    if in_memory:
        digests = {name: _sha(image.tobytes()) for name, image in zip(names, pixels.numpy(), strict=True)}
    marks = digests if in_memory else {name: size for name, (size, _) in stamps.items()}
    manifest = {name: (label, marks.get(name, "")) for name, label in zip(names, labels, strict=True)}
    contents = {name: (digests.get(name, ""), stamp) for name, (_, stamp) in stamps.items()}
    if before is not None and before.manifest:
        changed = _changed(before, [name for name in names if name not in lost], manifest, contents, listing.notes)
        if changed and not config.skip_damaged:
            raise _other_files(config, "changed", changed)
        lost |= dict.fromkeys(changed, "is another file than before")
        manifest, contents = before.manifest, before.contents
    lost_train, lost_test = (frozenset(k for k, n in enumerate(part.names) if n in lost) for part in (train, test))
    same = twins({name: digest for name, digest in digests.items() if name not in lost})
    record = FileRecord(train.names, manifest, left_out, lost_train, lost_test, lost, listing.notes, same, contents)
    name = f"folder {root.resolve().name}"
    y, count = torch.tensor(labels, dtype=torch.int64), len(train.names)
    if not in_memory:
        photographs = [Photographs(root, part.names) for part in (train, test)]
        return PhotographFolder(name, listing.classes, photographs[0], y[:count], photographs[1], y[count:], record)
    tests = torch.tensor([name not in lost for name in test.names], dtype=torch.bool)
    x_test, y_test = pixels[count:][tests], y[count:][tests]
    return Images(name, listing.classes, pixels[:count], y[:count], x_test, y_test, flip=True, files=record)


def _without(listing: Listing, bad: dict[str, str]) -> tuple[Files, Files]:
    """Training and test files but for the damaged ones."""
    train, test = (part.without(set(bad)) for part in (listing.train, listing.test))
    empty = [listing.classes[k] for k in sorted(set(range(len(listing.classes))) - set(train.labels))]
    if empty:
        raise DatasetError(f"no image of {', '.join(empty)} in {listing.root / 'train'} can be read: replace them.")
    return train, test


def _as_before(config: Config, before: FileRecord, train: Files, test: Files) -> tuple[Files, Files, dict[str, str]]:
    """The files of the run, in its order; those that are gone are lost, if that is allowed."""
    now = dict(zip(train.names + test.names, train.labels + test.labels, strict=True))
    new = [name for name in now if name not in before.manifest]
    gone = [name for name in before.manifest if name not in now]
    if new:
        raise _other_files(config, "new", new)
    if gone and not config.skip_damaged:
        raise _other_files(config, "gone", gone)
    known = set(before.train)
    tests = [name for name in before.manifest if name not in known]
    first, second = (Files(part, [before.manifest[name][0] for name in part]) for part in (before.train, tests))
    return first, second, dict.fromkeys(gone, "is gone")


def _changed(
    before: FileRecord, names: list[str], manifest: Manifest, contents: dict[str, tuple[str, str]], notes: list[str]
) -> list[str]:
    """The files that are others than the run began with, by their label, pixels, size or bytes."""
    changed, unsure = [], 0
    for name in names:
        (known, then), (digest, now) = before.contents.get(name, ("", "")), contents.get(name, ("", ""))
        if manifest[name] != before.manifest[name] or (known and digest and known != digest):
            changed.append(name)
        unsure += bool(then) and not known and then != now
    if unsure:
        notes.append(
            f"{unsure:,} files of their old sizes have other dates than when the run began, which had not read them: "
            "they are taken for the same. A run with --check-images True knows its files"
        )
    return changed


def _other_files(config: Config, what: str, names: list[str]) -> ResumeError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    remedy = "remove them" if what == "new" else "restore them, or give --skip-damaged to go on without them"
    return ResumeError(
        f"--data-dir {config.data_dir} differs from the data set that the run in {config.output} started with: "
        f"{len(names)} {'file is' if len(names) == 1 else 'files are'} {what} ({', '.join(names[:3])}{more}): "
        f"{remedy}, or give another --output to start a new run."
    )


def _check(
    config: Config, root: Path, stamps: dict[str, tuple[str, str]], before: FileRecord | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Read files before the first step: what is wrong with the bad ones, and a digest of each good one.

    A run that goes on reads those alone that may be others by now: their inodes or dates differ, as in a copy.
    """
    names = list(stamps) if config.check_images or (config.check_images is None and before is None) else []
    if before is not None and not names:
        known = before.contents
        names = [name for name in stamps if known.get(name, ("",))[0] and known[name][1] != stamps[name][1]]
    digests: dict[str, str] = {}

    def work(index: int) -> None:
        read_image(root / names[index])
        digests[names[index]] = _sha((root / names[index]).read_bytes())

    most = CHECK_SECONDS if config.check_images is None and before is None else None
    bad = for_each(len(names), work, verb="checked", most_seconds=most) if names else {}
    return {names[index]: reason for index, reason in bad.items()}, dict(sorted(digests.items()))


def _stamp(path: Path) -> tuple[str, str]:
    """Size of a file, and what changes when another one is put in its place, whatever its size."""
    try:
        found = path.stat()
    except OSError:  # a broken link, if files are not checked
        return str(NO_LABEL), ""
    return str(found.st_size), f"{found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}"


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


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
    from torchvision import datasets

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
