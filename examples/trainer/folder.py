"""Images in folders: `train/CLASS/**`, `test/CLASS/**` (or `val/`, or none), and `unlabeled/**` without classes."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.errors import DatasetError
from trainer.images import damaged, fit, for_each, read_image

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"}
)
NO_LABEL = -1
LEFT_OUT = "left_out.jsonl"  # of a run directory: the files that it goes on without
_BROKEN = "broken links"
# What archives, servers and disks put beside the images, thumbnails among it: hidden, whatever its name.
_SYSTEM = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})


@dataclass(frozen=True)
class Files:
    """Some files of a data set."""

    names: list[str]  # Paths below the data set's folder.
    labels: list[int]  # Class of each, or `NO_LABEL`.

    def without(self, left_out: set[str]) -> Files:
        """The same but for some names."""
        kept = [k for k, name in enumerate(self.names) if name not in left_out]
        return Files([self.names[k] for k in kept], [self.labels[k] for k in kept])


@dataclass(frozen=True)
class Listing:
    """The files of a folder data set, in label order and then by name; those without a label come last."""

    root: Path  # The folder.
    classes: list[str]  # Class names in alphabetical order, in Unicode's composed form.
    train: Files  # Training files.
    test: Files  # Test files; none where there is no test part.
    notes: list[str]  # What was found and is not used, for people.


def list_folder(root: Path) -> Listing:
    """List a folder data set without opening an image."""
    layout = "expected --data-dir to hold train/CLASS/IMAGE, and perhaps test/CLASS/IMAGE (or val/) and unlabeled/IMAGE"
    if not root.is_dir():
        raise DatasetError(f"--data-dir {root} is not a directory: {layout}.")
    train, unlabeled = root / "train", root / "unlabeled"
    held = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not train.is_dir():
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise DatasetError(f"--data-dir {root} holds {found}: {layout}.")
    for part in (root / name for name in ("test", "val", "unlabeled")):
        if os.path.lexists(part) and not part.is_dir():
            raise DatasetError(f"{part} is a file or a broken link: make it a directory, or remove it.")
    skipped: collections.Counter[str] = collections.Counter()
    folders = class_folders(train, skipped)
    classes = sorted(folders)
    if len(classes) < 2:
        raise DatasetError(f"{train} has {len(classes)} class directories; a classifier needs at least two.")
    files = _labeled(root, train, folders, classes, skipped)
    tested = Files([], [])
    if held:
        test_folders = class_folders(held[0], skipped)
        if classes != sorted(test_folders):
            raise DatasetError(
                f"{train} and {held[0]} must have the same class directories: only in train: "
                f"{sorted(set(classes) - set(test_folders)) or 'none'}; only in {held[0].name}: "
                f"{sorted(set(test_folders) - set(classes)) or 'none'}."
            )
        tested = _labeled(root, held[0], test_folders, classes, skipped)
    if unlabeled.exists():
        names = walk(root, "unlabeled", skipped)
        if not names:
            raise DatasetError(f"{unlabeled} holds no image ({', '.join(sorted(SUFFIXES))}): add images or remove it.")
        files = Files(files.names + names, files.labels + [NO_LABEL] * len(names))
    notes = [f"{held[1]} is not used: {held[0].name}/ is the test part"] if len(held) > 1 else []
    with os.scandir(root) as entries:
        others = {entry.name for entry in entries if not _is_hidden(entry.name) and _is_folder(entry)}
    if others := others - {"train", "test", "val", "unlabeled"}:
        notes.append(f"not used: {', '.join(sorted(others)[:5])} beside train/, test/ (or val/) and unlabeled/")
    alike = collections.Counter(name.casefold().strip() for name in classes)
    notes += [
        f"{count} class folders read {name!r} but for case or spaces" for name, count in alike.items() if count > 1
    ]
    return Listing(root, classes, files, tested, notes + unused(skipped))


def unused(skipped: collections.Counter[str]) -> list[str]:
    """What was passed over, as a note for people; none where it is nothing."""
    found = ", ".join(f"{count:,} {what}" for what, count in sorted(skipped.items()))
    return [f"not used: {found}"] if found else []


def say_unused(skipped: collections.Counter[str]) -> None:
    """Print what was passed over."""
    print("".join(f"note: {note}\n" for note in unused(skipped)), end="", file=sys.stderr)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM


def class_folders(part: Path, skipped: collections.Counter[str]) -> dict[str, str]:
    """Class name to the folder's name: the same letters may be written in several ways (macOS decomposes them)."""
    folders: dict[str, str] = {}
    for entry in sorted(os.scandir(part), key=lambda entry: entry.name):
        if _is_hidden(entry.name):
            skipped["hidden"] += 1
        elif not _is_folder(entry):
            broken = entry.is_symlink() and not os.path.exists(entry.path)
            skipped[_BROKEN if broken else f"beside the class folders of {part.name}/"] += 1
        else:
            try:
                own = os.fsencode(entry.name).decode()  # whatever encoding the locale has
            except UnicodeDecodeError as error:
                shown = os.fsencode(entry.name).decode(errors="backslashreplace")
                raise DatasetError(f"{part} has a class folder {shown!r} that is no UTF-8: rename it.") from error
            if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in own):
                raise DatasetError(f"{part} has a class folder {own!r}, with a line break or the like: rename it.")
            name = unicodedata.normalize("NFC", own)
            if name in folders:
                raise DatasetError(
                    f"{part} has two class folders that both read {name!r}, in different Unicode forms: merge them."
                )
            folders[name] = entry.name
    return folders


def _labeled(
    root: Path, part: Path, folders: dict[str, str], classes: list[str], skipped: collections.Counter[str]
) -> Files:
    names: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        members = walk(root, os.path.join(part.name, folders[name]), skipped)
        if not members:
            raise DatasetError(
                f"{part / folders[name]} holds no image ({', '.join(sorted(SUFFIXES))}): "
                "add images or remove the class."
            )
        names += members
        labels += [number] * len(members)
    return Files(names, labels)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def walk(root: Path, below: str, skipped: collections.Counter[str], above: frozenset[str] = frozenset()) -> list[str]:
    """Images in a folder below `root`, and in its sub-folders, sorted; counts what is passed over.

    Links are followed, but not in circles: not to the folders above, which lead here.
    """
    real = os.path.realpath(root / below)
    if real in above:
        skipped["links to a folder above"] += 1
        return []
    names: list[str] = []
    try:
        entries = sorted(os.scandir(root / below), key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"{root / below} cannot be listed ({error}): allow it, or remove the folder.") from error
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        if _is_hidden(entry.name):
            skipped["hidden"] += 1
        elif _is_folder(entry):
            inside = walk(root, os.path.join(below, entry.name), skipped, above | {real})
            if suffix in SUFFIXES and not inside:
                skipped["empty folders named like an image"] += 1
            names += inside
        elif suffix in SUFFIXES:
            names.append(os.path.join(below, entry.name))
        else:
            broken = entry.is_symlink() and not os.path.exists(entry.path)
            skipped[_BROKEN if broken else f"of type {suffix or 'unknown'}"] += 1
    return names


def decode(root: Path, names: list[str], side: int | None, lost: dict[str, str]) -> tuple[Tensor, dict[int, str]]:
    """Decode images below a folder into one array; lost ones are left as zeros.

    They are scaled by their shorter side and cut to the centre square of `side`; without it, all must have one size.
    """
    images: np.ndarray | None = None
    sizes: dict[int, tuple[int, int]] = {}
    first, bad = 0, {}
    for first in range(len(names)):  # the first that can be read decides the size
        try:
            width, height = (side, side) if side else read_image(root / names[first]).size
            images = np.zeros((len(names), height, width, 3), dtype=np.uint8)
            break
        except DatasetError as error:
            bad[first] = str(error)
    if images is None:
        raise damaged(bad)
    if min(images.shape[1:3]) < 2:
        raise DatasetError("images of one pixel cannot be shifted: give --image-size 2 or more.")

    def work(index: int) -> None:
        if names[index] in lost:
            return
        image = read_image(root / names[index])
        if side is not None:
            image = fit(image, side, side)
        if image.size == (width, height):
            images[index] = np.asarray(image)
        else:
            sizes[index] = image.size

    found = for_each(len(names), work, verb="decoded")
    if sizes:
        index = min(sizes)
        raise DatasetError(
            f"{root / names[index]} is {sizes[index][0]}x{sizes[index][1]}, but {root / names[first]} is "
            f"{width}x{height}: give --image-size SIDE to resize and centre-crop every image to one size."
        )
    return torch.from_numpy(images), found


Manifest = dict[str, tuple[int, str]]


@dataclass
class FileRecord:
    """What is known of the files of a folder data set."""

    train: list[str]  # Names of the training files, below the data set's folder.
    manifest: Manifest  # Label and fingerprint of every file, by name: what must be the same on resume.
    # Name to reason of files that were damaged before the first step.
    left_out: dict[str, str] = field(default_factory=dict)
    # Indices of training files that went bad later, and of none of which a view is made.
    lost: frozenset[int] = frozenset()
    lost_tests: frozenset[int] = frozenset()  # The same of test files.
    reasons: dict[str, str] = field(default_factory=dict)  # Name to reason of the lost ones.
    notes: list[str] = field(default_factory=list)  # For people.
    # Names of files that show the same image, where it was looked for.
    twins: list[list[str]] = field(default_factory=list)
    # Name to digest (empty where it was not read) and stamp of each file of a stream.
    contents: dict[str, tuple[str, str]] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of the manifest."""
        lines = (json.dumps([name, *known]) + "\n" for name, known in self.manifest.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def twins(digests: dict[str, str]) -> list[list[str]]:
    """Names of equal digests, where there are several."""
    names: dict[str, list[str]] = {}
    for name, digest in digests.items():
        names.setdefault(digest, []).append(name)
    return [group for group in names.values() if len(group) > 1]
