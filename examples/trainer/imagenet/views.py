"""Views of one photograph by torchvision's transforms, each from a seed of its own.

weak:   a random crop scaled to the network's size, mirrored with probability 1/2.
strong: a weak view of its own, then RandAugment(2, 10).
test:   the shorter side scaled to 8/7 of the network's size, and the centre.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

View = Callable[[Image.Image], Image.Image]
Pixels = NDArray[np.uint8]


def weak_view(size: int, crop_scale: float) -> View:
    """Random crop of at least `crop_scale` of the area, scaled to `size`, and mirrored or not."""
    crop = transforms.RandomResizedCrop(size, scale=(crop_scale, 1.0))
    return transforms.Compose([crop, transforms.RandomHorizontalFlip()])


def strong_view(policy: str, size: int, crop_scale: float) -> View:
    """A weak view, for the policy `randaugment` with two operations of magnitude 10 of 30 after it."""
    weak = weak_view(size, crop_scale)
    if policy == "weak":
        return weak
    return transforms.Compose([weak, transforms.RandAugment(num_ops=2, magnitude=10)])


def test_view(size: int) -> View:
    """The centre of the image; nothing random."""
    return transforms.Compose([transforms.Resize(round(size * 8 / 7)), transforms.CenterCrop(size)])


def render(view: View, image: Image.Image, seed: int) -> Pixels:
    """Apply a view.

    Args:
        view: From image to image; may draw from torch's default CPU generator, as torchvision's transforms do.
        image: In RGB.
        seed: Decides all its draws; the generator's state is what it was afterwards.

    Returns:
        uint8 `[size, size, 3]`.
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
