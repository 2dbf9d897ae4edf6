"""The fourteen image operations of the FixMatch reference's RandAugment, as functions of a magnitude 1..9.

The table `OPERATIONS` is the definition: a name, and a function of (image, magnitude, sign). Geometric operations
fill with mid-grey, which is what a transparent pixel becomes after the reference's normalisation to [-1, 1].

Reference: Sohn et al., "FixMatch" (2020), appendix D, and its published code's ranges.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Operation = Callable[[Image.Image, int, int], Image.Image]

GREY = (127, 127, 127)
MAX_MAGNITUDE = 10  # the scale of the magnitudes; the reference draws 1..9


def _fraction(magnitude: int) -> float:
    return magnitude / MAX_MAGNITUDE


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    # Factor 0.1 + 1.8 m / 10: 0.28 .. 1.72 for the magnitudes drawn; 1 would not change the image.
    return lambda image, magnitude, sign: kind(image).enhance(0.1 + 1.8 * _fraction(magnitude))


def _lookup(image: Image.Image, tables: list[np.ndarray]) -> Image.Image:
    pixels = np.asarray(image)
    channels = [table[pixels[..., channel]] for channel, table in enumerate(tables)]
    return Image.fromarray(np.stack(channels, axis=-1))


def autocontrast(image: Image.Image) -> Image.Image:
    """`PIL.ImageOps.autocontrast` without a cutoff, per channel; its Python loops cost 20 times as much here."""
    pixels = np.asarray(image).reshape(-1, 3)
    values = np.arange(256)
    tables = []
    for low, high in zip(pixels.min(0).tolist(), pixels.max(0).tolist(), strict=True):
        if high <= low:
            tables.append(values.astype(np.uint8))
            continue
        scale = 255.0 / (high - low)
        tables.append(np.clip((values * scale + -low * scale).astype(np.int64), 0, 255).astype(np.uint8))
    return _lookup(image, tables)


def equalize(image: Image.Image) -> Image.Image:
    """`PIL.ImageOps.equalize`, per channel; its Python loops cost several times as much here."""
    pixels = np.asarray(image).reshape(-1, 3)
    tables = []
    for channel in range(3):
        counts = np.bincount(pixels[:, channel], minlength=256)
        present = counts[counts > 0]
        step = (int(counts.sum()) - int(present[-1])) // 255
        if len(present) <= 1 or step == 0:
            tables.append(np.arange(256, dtype=np.uint8))
            continue
        before = np.concatenate(([0], np.cumsum(counts)[:-1]))
        tables.append(np.clip((before + step // 2) // step, 0, 255).astype(np.uint8))
    return _lookup(image, tables)


def _affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, fillcolor=GREY)


def translation(side: int, magnitude: int) -> int:
    """Pixels of a translation: `magnitude` of 32, in proportion on larger and smaller images."""
    return round(magnitude * side / 32)


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, magnitude, sign: autocontrast(image),
    "brightness": _enhance(ImageEnhance.Brightness),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "equalize": lambda image, magnitude, sign: equalize(image),
    "identity": lambda image, magnitude, sign: image,
    "posterize": lambda image, magnitude, sign: ImageOps.posterize(image, 4 - int(4 * _fraction(magnitude))),
    "rotate": lambda image, m, sign: image.rotate(sign * int(30 * _fraction(m)), fillcolor=GREY),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, m, sign: _affine(image, (1, sign * 0.3 * _fraction(m), 0, 0, 1, 0)),
    "shear_y": lambda image, m, sign: _affine(image, (1, 0, 0, sign * 0.3 * _fraction(m), 1, 0)),
    "solarize": lambda image, magnitude, sign: ImageOps.solarize(image, 256 - int(256 * _fraction(magnitude))),
    "translate_x": lambda image, m, sign: _affine(image, (1, 0, sign * translation(image.width, m), 0, 1, 0)),
    "translate_y": lambda image, m, sign: _affine(image, (1, 0, 0, 0, 1, sign * translation(image.height, m))),
}
