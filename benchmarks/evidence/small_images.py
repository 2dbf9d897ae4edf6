"""The small images that short_runs.py trains on, and their two views: embedded digits, and photographs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES = ("airplane", "automobile")  # of the photographs; chosen on held-out images, without the term
Parts = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Images:
    """What is trained on.

    Attributes:
        parts: images [n, channels, size, size] and labels, to "test", "held out" and to "train" on; the same for every
            seed.
        classes: how many.
        weak, strong: from images and a generator to views.
        threshold: of confident pairs; chosen on held-out images, without the term.
        width: channels of the network's first convolution; each further one has twice as many, and halves the size.
        depth: how many convolutions.
        pool: edge of the squares that are averaged before the head.
    """

    parts: Parts
    classes: int
    weak: Callable[[Tensor, torch.Generator], Tensor]
    strong: Callable[[Tensor, torch.Generator], Tensor]
    threshold: float
    width: int
    depth: int
    pool: int

    @property
    def digest(self) -> str:
        """A number for all images and labels."""
        found = hashlib.sha256()
        for _, tensors in sorted(self.parts.items()):
            for tensor in tensors:
                found.update(tensor.numpy().tobytes())
        return found.hexdigest()


def digits() -> Images:
    """scikit-learn's digits, 8x8: 500 to test, 400 held out, 897 to train on."""
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    parts = _parted(x, torch.tensor(found.target), {"test": 500, "held out": 400, "train": len(x) - 900})
    return Images(parts, 10, _weak_digit, _strong_digit, threshold=0.7, width=16, depth=2, pool=1)


def photographs(folder: Path) -> Images:
    """Photographs of two classes of CIFAR-10, reduced to 16x16 pixels.

    Args:
        folder: the images as `train/CLASS/*.jpg` and `test/CLASS/*.jpg`. Of train/, 2,000 are held out.

    Raises:
        FileNotFoundError: a class has no folder, or an empty one.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for part in ("train", "test"):
        x, labels = [], []
        for label, name in enumerate(CLASSES):
            files = sorted((folder / part / name).glob("*.jpg"))
            if not files:
                raise FileNotFoundError(f"{folder / part / name} has no .jpg files")
            for file in files:
                with Image.open(file) as image:
                    small = image.convert("RGB").resize((16, 16), Image.Resampling.BOX)
                x.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(16, 16, 3))
            labels += [label] * len(files)
        found[part] = torch.stack(x).permute(0, 3, 1, 2) / 255, torch.tensor(labels)
    mean, deviation = (getattr(found["train"][0], kind)((0, 2, 3), keepdim=True) for kind in ("mean", "std"))
    scaled = {part: ((x - mean) / deviation, y) for part, (x, y) in found.items()}
    parts = _parted(*scaled["train"], {"held out": 2000, "train": len(scaled["train"][0]) - 2000})
    return Images(
        parts | {"test": scaled["test"]},
        len(CLASSES),
        _weak_photograph,
        _strong_photograph,
        threshold=0.8,
        width=8,
        depth=3,
        pool=2,
    )


def _parted(x: Tensor, y: Tensor, sizes: dict[str, int]) -> Parts:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split(list(sizes.values()))
    return {name: (x[part], y[part]) for name, part in zip(sizes, order, strict=True)}


def moved(x: Tensor, generator: torch.Generator, turn: float, shift: float, scale: float, shear: float) -> Tensor:
    """Each image turned, shifted, scaled and sheared at random."""
    bounds = torch.tensor([turn, scale, shear, shift, shift])
    angle, size, slant, right, down = (bounds * (2 * torch.rand(len(x), 5, generator=generator) - 1)).T
    size = 1 + size
    rows = [size * angle.cos(), slant - angle.sin(), right], [angle.sin(), size * angle.cos(), down]
    grid = F.affine_grid(torch.stack([torch.stack(row, 1) for row in rows], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _weak_digit(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 6 degrees, shifted by up to 0.6 pixels."""
    return moved(x, generator, 0.1, 0.15, 0.05, 0.0)


def _strong_digit(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 16 degrees, shifted, sheared, with another contrast, noise and a hole of 3x3 pixels."""
    x = moved(x, generator, 0.28, 0.175, 0.14, 0.21)
    x = x * (0.65 + 0.7 * torch.rand(len(x), 1, 1, 1, generator=generator))
    x = x + 0.21 * torch.randn(x.shape, generator=generator)
    return _with_hole(x, generator, 2)


def _weak_photograph(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored or not, shifted by up to one pixel."""
    return moved(_mirrored(x, generator), generator, 0.0, 0.125, 0.0, 0.0)


def _strong_photograph(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored or not, turned by up to 17 degrees, shifted, sheared, with other colours and a hole of 7x7 pixels."""
    x = moved(_mirrored(x, generator), generator, 0.3, 0.2, 0.2, 0.2)
    contrast, colour = (
        torch.rand(len(x), 1, 1, 1, generator=generator),
        torch.randn(len(x), 3, 1, 1, generator=generator),
    )
    return _with_hole(x * (0.6 + 0.8 * contrast) + 0.4 * colour, generator, 4)


def _mirrored(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)


def _with_hole(x: Tensor, generator: torch.Generator, reach: int) -> Tensor:
    """Each image with a square of zeros at a random place, which reaches so far from its middle."""
    size = x.shape[-1]
    near = (torch.arange(size) - torch.randint(size, (2, len(x), 1), generator=generator)).abs() < reach
    return x.masked_fill((near[0, :, :, None] & near[1, :, None, :])[:, None], 0.0)
