"""Folders of random images, the same each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

#: What the fixture `photo_folder` gives.
MakeFolder = Callable[..., Path]
Parts = dict[str, dict[str, int]]


def draw_folder(
    root: Path, parts: Parts, *, size: tuple[int, int] = (8, 8), name: str = "{number:03d}.png", **saving: int
) -> Path:
    """`parts` has the number of images by part and class; the format of a name may use the class, too."""
    source = np.random.Generator(np.random.Philox(3))
    for part, classes in parts.items():
        for label, count in classes.items():
            folder = root / part / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = source.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name.format(label=label, number=number), **saving)
    return root
