"""The balanced labeled split: drawn from the seed, stored with its SHA-256, and checked on resume."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.errors import OptionError, ResumeError
from trainer.files import read_json, write_json
from trainer.streams import Stream, permutation


@dataclass(frozen=True)
class Split:
    """Which training images are labeled; the unlabeled set is all of them, the labeled ones included.

    Attributes:
        labeled: Sorted indices `[labels]` into the training images.
        digest: SHA-256 of the class names, all training labels and the labeled indices.
        data_digest: SHA-256 of the training and test pixels and labels.
    """

    labeled: Tensor
    digest: str
    data_digest: str

    def record(self, classes: list[str]) -> dict[str, Any]:
        """What `split.json` holds."""
        return {
            "sha256": self.digest,
            "data_sha256": self.data_digest,
            "classes": classes,
            "labeled": self.labeled.tolist(),
        }


class LabeledData(Protocol):
    """A data set as far as a split needs it: `Images`, or files that are not in memory."""

    @property
    def classes(self) -> list[str]:
        """Class names, in label order."""

    @property
    def train_y(self) -> Tensor:
        """Training labels, int64 `[N]`."""

    def digest(self) -> str:
        """SHA-256 of what must be the same on resume."""


def draw_split(images: LabeledData, labels: int, seed: int) -> Split:
    """Choose the same number of labeled images from each class.

    Args:
        images: The data set.
        labels: Labeled images in all.
        seed: The run's seed.

    Returns:
        The split.

    Raises:
        OptionError: Where `labels` is not divisible by the number of classes, or a class is too small.
    """
    count = len(images.classes)
    if labels % count or labels < count:
        lower = max(labels // count, 1) * count
        raise OptionError(
            f"--labels {labels} cannot be balanced over {count} classes: "
            f"give a multiple of {count}, for example {lower} or {lower + count}."
        )
    per_class = labels // count
    sizes = torch.bincount(images.train_y, minlength=count)
    smallest = int(sizes.argmin())
    if sizes[smallest] < per_class:
        raise OptionError(
            f"--labels {labels} asks for {per_class} labeled images of each class, but class "
            f"{images.classes[smallest]!r} has {sizes[smallest]}: give at most {int(sizes[smallest]) * count}."
        )
    return make_split(images, draw_labeled(images, [per_class] * count, seed))


def draw_labeled(images: LabeledData, per_class: Sequence[int], seed: int) -> Tensor:
    """Choose images of each class at random.

    Args:
        images: The data set.
        per_class: How many of each class.
        seed: The run's seed.

    Returns:
        Indices into the training images.
    """
    chosen = []
    for number, wanted in enumerate(per_class):
        members = torch.nonzero(images.train_y == number).flatten()
        order = permutation(seed, Stream.SPLIT, number, len(members))
        chosen.append(members[torch.from_numpy(order[:wanted])])
    return torch.cat(chosen)


def make_split(images: LabeledData, labeled: Tensor) -> Split:
    """The split in which `labeled` are the labeled images, with its digests."""
    labeled = labeled.sort().values
    digest = hashlib.sha256("\n".join(images.classes).encode())
    for part in (images.train_y, labeled):
        digest.update(part.numpy().astype("<i8").tobytes())
    return Split(labeled, digest.hexdigest(), images.digest())


def store_or_check(path: Path, split: Split, classes: list[str]) -> None:
    """Write `split.json`, or compare with the one that is there.

    Args:
        path: The file.
        split: This call's split.
        classes: Class names.

    Raises:
        ResumeError: Where the stored split or the data differ, or the file is damaged or lost.
    """
    if not path.exists():
        if any(path.parent.glob("checkpoints/*.pt")):  # it is written before the first of them
            raise ResumeError(f"{path} is missing from a run with checkpoints: restore it, or give another --output.")
        write_json(path, split.record(classes))
        return
    try:
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise ValueError(f"it holds a {type(stored).__name__}")
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path} cannot be read ({error}): restore it, or give another --output.") from error
    for key, now, what in (
        ("sha256", split.digest, "labeled split"),
        ("data_sha256", split.data_digest, "data set (pixels or labels)"),
    ):
        if stored.get(key) != now:
            raise ResumeError(
                f"{path}: the {what} differs from the one that this run started with "
                f"(SHA-256 {stored.get(key)} there, {now} now). "
                "Restore the data as it was, or give another --output to start a new run."
            )
