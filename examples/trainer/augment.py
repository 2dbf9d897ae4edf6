"""Weak and strong views of images, from draws or seeds that the caller supplies: no hidden random state.

weak:   mirror (where a mirrored image is of the same class), then a random crop after reflection padding.
strong: a weak view of its own, then one of the `POLICIES`.

Those of whole photographs are random crops by torchvision's transforms, scaled to the network's size.

`OPERATIONS` are the fourteen of the FixMatch reference: a name, and a function of (image, magnitude 1..9, sign). Those
that move pixels fill with mid-grey, which is what a transparent pixel becomes after the reference's normalisation to
[-1, 1]. Source: Sohn et al., "FixMatch" (2020), appendix D, and its published code's ranges.

Index letters: N images, H and W their sides; images are uint8 `[N, H, W, 3]`, draws uniform in [0, 1) `[N, K]`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as vision

Pixels = NDArray[np.uint8]
Draws = NDArray[np.float64]
Operation = Callable[[Image.Image, int, int], Image.Image]

WEAK_DRAWS = 3
STRONG_DRAWS = WEAK_DRAWS + 2 * 4 + 2  # weak, two operations of four draws each, the cutout's centre
GREY = (127, 127, 127)
NUM_OPS, MAGNITUDE, BINS = 2, 10, 31  # of torchvision's RandAugment
Levelled = Callable[[Image.Image, float], Image.Image]
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
_NAMES = list(OPERATIONS)


def weak_view(images: Pixels, draws: Draws, *, flip: bool) -> Pixels:
    """Mirror with probability 1/2, then crop after reflection padding by an eighth of the side (4 pixels of 32)."""
    number, height, width, _ = images.shape
    rows = _crop_index(height, draws[:, 1])
    columns = _crop_index(width, draws[:, 2])
    if flip:
        mirrored = draws[:, :1] < 0.5
        columns = np.where(mirrored, width - 1 - columns, columns)  # mirrored first, cropped then
    return images[np.arange(number)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _crop_index(side: int, draw: NDArray[np.float64]) -> NDArray[np.int64]:
    """Source positions `[N, side]` of a random crop from the image padded by reflection without its edge."""
    padding = max(1, side // 8)
    shift = (draw * (2 * padding + 1)).astype(np.int64) - padding  # [N], -padding .. padding
    position = np.abs(np.arange(side)[None, :] + shift[:, None])
    return np.where(position >= side, 2 * (side - 1) - position, position)


def strong_view(images: Pixels, draws: Draws, policy: str, *, flip: bool) -> Pixels:
    """A weak view with a strong policy on top."""
    views = weak_view(images, draws[:, :WEAK_DRAWS], flip=flip)
    return POLICIES[policy](views, draws[:, WEAK_DRAWS:])


def fixmatch_policy(images: Pixels, draws: Draws) -> Pixels:
    """The FixMatch reference's: two draws of an operation, each with p = 1/2 and magnitude 1..9; then Cutout.

    Draws `[N, 10]` are per operation which, whether, magnitude and sign; then the cutout's centre.
    """
    out = np.empty_like(images)
    for n, row in enumerate(draws.tolist()):
        image = None
        for which, whether, magnitude, sign in (row[0:4], row[4:8]):
            if whether < 0.5:
                image = Image.fromarray(images[n]) if image is None else image
                operation = OPERATIONS[_NAMES[int(which * len(_NAMES))]]
                image = operation(image, 1 + int(magnitude * 9), 1 if sign < 0.5 else -1)
        out[n] = images[n] if image is None else np.asarray(image)
        _cutout(out[n], row[8], row[9])
    return out


def _cutout(image: Pixels, vertical: float, horizontal: float) -> None:
    """Grey out a square of half the side around a random centre, clipped at the border; in place."""
    height, width, _ = image.shape
    y, x = int(vertical * height), int(horizontal * width)
    half_y, half_x = max(1, height // 4), max(1, width // 4)
    image[max(0, y - half_y) : y + half_y, max(0, x - half_x) : x + half_x] = GREY


def randaugment(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """Torchvision's `RandAugment(num_ops=2, magnitude=10)`, bit for bit, in a fraction of its time.

    Torchvision builds a table of tensors for every image, and PIL loops over colour tables in Python. Here the table is
    built once for each image size, and the loops are NumPy's. `tests/examples/test_augment.py` holds the two equal.
    """
    table = _table(*image.size)
    for _ in range(NUM_OPS):
        operation, level, signed = table[int(torch.randint(len(table), (1,), generator=generator))]
        if signed and torch.randint(2, (1,), generator=generator):
            level = -level
        image = operation(image, level)
    return image


@functools.cache
def _table(width: int, height: int) -> list[tuple[Levelled, float, bool]]:
    """Each operation with its level at the magnitude, and whether the sign is random; the order is torchvision's."""

    def level(first: float, last: float) -> float:
        return float(torch.linspace(first, last, BINS)[MAGNITUDE])

    return [
        (lambda image, level: image, 0.0, False),
        (lambda image, level: _turned(image, shear=[_degrees(level), 0.0], center=[0, 0]), level(0.0, 0.3), True),
        (lambda image, level: _turned(image, shear=[0.0, _degrees(level)], center=[0, 0]), level(0.0, 0.3), True),
        (lambda image, level: _turned(image, translate=[int(level), 0]), level(0.0, 150.0 / 331.0 * width), True),
        (lambda image, level: _turned(image, translate=[0, int(level)]), level(0.0, 150.0 / 331.0 * height), True),
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


def _turned(image: Image.Image, **changes: list[int] | list[float]) -> Image.Image:
    return vision.affine(image, **{"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], **changes})


def randaugment_policy(images: Pixels, draws: Draws) -> Pixels:
    """Torchvision's `RandAugment(num_ops=2, magnitude=10)`, each image with a seed of its own."""
    out = np.empty_like(images)
    generator = torch.Generator()
    for n, draw in enumerate(draws[:, 0].tolist()):
        generator.manual_seed(int(draw * 2**53))
        out[n] = np.asarray(randaugment(Image.fromarray(images[n]), generator))
    return out


POLICIES: dict[str, Callable[[Pixels, Draws], Pixels]] = {
    "randaugment": randaugment_policy,
    "fixmatch": fixmatch_policy,
    "weak": lambda views, draws: views,  # a second weak view, by draws of its own
}


View = Callable[[Image.Image], Image.Image]


def random_crop(size: int, crop_scale: float, *, flip: bool) -> View:
    """Random crop of at least `crop_scale` of the area, scaled to `size`, and mirrored or not."""
    crop = transforms.RandomResizedCrop(size, scale=(crop_scale, 1.0))
    return transforms.Compose([crop, transforms.RandomHorizontalFlip()]) if flip else crop


def strong_crop(policy: str, size: int, crop_scale: float, *, flip: bool) -> View:
    """A weak view with a strong policy on it: `randaugment` is two operations of magnitude 10 of 30."""
    weak = random_crop(size, crop_scale, flip=flip)
    if policy == "weak":
        return weak
    strong = transforms.RandAugment(num_ops=2, magnitude=10) if policy == "randaugment" else _fixmatch
    return transforms.Compose([weak, strong])


def _fixmatch(image: Image.Image) -> Image.Image:
    draws = torch.rand(1, STRONG_DRAWS - WEAK_DRAWS, dtype=torch.float64).numpy()
    return Image.fromarray(fixmatch_policy(np.asarray(image)[None], draws)[0])


def render(view: View, image: Image.Image, seed: int) -> Pixels:
    """Apply a view to an RGB image.

    The seed decides all that it draws from torch's default CPU generator, whose state is afterwards what it was.
    """
    with _seeded(seed):
        return np.asarray(view(image))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
