"""Torchvision's `RandAugment(num_ops=2, magnitude=10)`, bit for bit, in a fraction of its time.

Torchvision builds a table of tensors for every image, and PIL loops over colour tables in Python. Here the table is
built once for each image size, and the loops are NumPy's. `tests/examples/test_augment.py` holds the two equal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as vision

from trainer.augment import autocontrast, equalize

NUM_OPS, MAGNITUDE, BINS = 2, 10, 31
Operation = Callable[[Image.Image, float], Image.Image]


def randaugment(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """Apply two random operations."""
    table = _table(*image.size)
    for _ in range(NUM_OPS):
        operation, level, signed = table[int(torch.randint(len(table), (1,), generator=generator))]
        if signed and torch.randint(2, (1,), generator=generator):
            level = -level
        image = operation(image, level)
    return image


@functools.cache
def _table(width: int, height: int) -> list[tuple[Operation, float, bool]]:
    """Each operation with its level at the magnitude, and whether the sign is random; the order is torchvision's."""

    def level(first: float, last: float) -> float:
        return float(torch.linspace(first, last, BINS)[MAGNITUDE])

    return [
        (lambda image, level: image, 0.0, False),
        (lambda image, level: _affine(image, shear=[_degrees(level), 0.0], center=[0, 0]), level(0.0, 0.3), True),
        (lambda image, level: _affine(image, shear=[0.0, _degrees(level)], center=[0, 0]), level(0.0, 0.3), True),
        (lambda image, level: _affine(image, translate=[int(level), 0]), level(0.0, 150.0 / 331.0 * width), True),
        (lambda image, level: _affine(image, translate=[0, int(level)]), level(0.0, 150.0 / 331.0 * height), True),
        (vision.rotate, level(0.0, 30.0), True),
        (lambda image, level: vision.adjust_brightness(image, 1.0 + level), level(0.0, 0.9), True),
        (lambda image, level: vision.adjust_saturation(image, 1.0 + level), level(0.0, 0.9), True),
        (lambda image, level: vision.adjust_contrast(image, 1.0 + level), level(0.0, 0.9), True),
        (lambda image, level: vision.adjust_sharpness(image, 1.0 + level), level(0.0, 0.9), True),
        (_posterize, 8.0 - round(4 * MAGNITUDE / (BINS - 1)), False),
        (_solarize, level(255.0, 0.0), False),
        (lambda image, level: autocontrast(image), 0.0, False),
        (lambda image, level: equalize(image), 0.0, False),
    ]


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    return Image.fromarray(np.asarray(image) & np.uint8(256 - 2 ** (8 - int(bits))))


def _solarize(image: Image.Image, threshold: float) -> Image.Image:
    pixels = np.asarray(image)
    return Image.fromarray(np.where(pixels < threshold, pixels, 255 - pixels))


def _degrees(level: float) -> float:
    return math.degrees(math.atan(level))


def _affine(image: Image.Image, **changes: list[int] | list[float]) -> Image.Image:
    return vision.affine(image, **{"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], **changes})
