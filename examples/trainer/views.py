"""Random crops of whole photographs by torchvision's transforms, each from its own seed.

weak:   a random crop scaled to the network's size, mirrored with probability 1/2.
strong: another weak view, then one of the policies of `augment`, or torchvision's RandAugment(2, 10).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

from trainer.augment import STRONG_DRAWS, WEAK_DRAWS, fixmatch_policy

View = Callable[[Image.Image], Image.Image]
Pixels = NDArray[np.uint8]


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
