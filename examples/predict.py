"""Classify images with a trained model, and print one CSV line per image.

Examples:
    python predict.py runs/first photo.jpg holiday/
    python predict.py runs/first holiday/ --top 3 > predictions.csv

From Python, `predict.load("runs/first")` gives a function from image files to probabilities, with the preprocessing as
its method `preprocess`.
"""

from __future__ import annotations

import argparse
import collections
import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import DatasetError, refuse
from trainer.launch import Parser, guarded

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn


class Classifier:
    """A trained model with the preprocessing that belongs to it; `classes` are in the order of the probabilities."""

    def __init__(self, model: nn.Module, about: dict[str, Any], device: str = "cpu") -> None:
        from trainer.loader import ToModel
        from trainer.processes import usable_device

        place = usable_device(device)
        self.model, self.about, self.classes = model.to(place), about, list(about["classes"])
        self.size: tuple[int, int] = tuple(about["image_size"])  # height and width
        self.to_model = ToModel(about["mean"], about["std"], place)

    def pixels(self, image: Image.Image | Path | str) -> Tensor:
        """An image as the run saw it: upright RGB, scaled and cut to its size, uint8 `[H, W, 3]`."""
        import numpy as np
        import torch

        from trainer.images import fit, read_image, to_rgb

        rgb = read_image(Path(image)) if isinstance(image, str | Path) else to_rgb(image)
        height, width = self.size
        if rgb.size != (width, height) or int(self.about.get("shorter_side", height)) != height:
            if height != width:
                name = image if isinstance(image, str | Path) else "the image"
                raise DatasetError(
                    f"{name} is {rgb.width}x{rgb.height}, and the model takes {width}x{height}: resize it"
                )
            rgb = fit(rgb, int(self.about.get("shorter_side", height)), height)
        return torch.from_numpy(np.array(rgb))

    def preprocess(self, image: Image.Image | Path | str) -> Tensor:
        """An image as the network takes it: normalised, `[3, H, W]`."""
        return self.to_model.images(self.pixels(image)[None])[0]

    def __call__(self, images: Sequence[Image.Image | Path | str]) -> Tensor:
        """Probabilities `[N, K]` of some images."""
        return self.logits([self.pixels(image) for image in images]).softmax(1)

    def logits(self, pixels: Sequence[Tensor]) -> Tensor:
        """Logits `[N, K]` of images as `pixels` returns them."""
        import torch

        with torch.no_grad():
            return self.model(self.to_model.images(torch.stack(list(pixels)))).float().cpu()

    def batches(self, paths: Iterable[Path], size: int) -> Iterator[tuple[list[Path], Tensor | DatasetError]]:
        """Up to `size` files at a time with their logits; one that cannot be read comes alone, with what is wrong."""
        known: list[Path] = []
        pixels: list[Tensor] = []
        for path in paths:
            try:
                pixels.append(self.pixels(path))
            except DatasetError as error:
                yield [path], error
                continue
            known.append(path)
            if len(known) == size:
                yield known, self.logits(pixels)
                known, pixels = [], []
        if known:
            yield known, self.logits(pixels)


def load(run: Path | str, device: str = "cpu") -> Classifier:
    """Load what a run trained: from its directory, finished or not, its `model.safetensors`, or a checkpoint in it."""
    from trainer.weights import load_model

    return Classifier(*load_model(run), device)


def files(given: Iterable[Path], skipped: collections.Counter[str]) -> Iterator[Path]:
    """Some files, and the images in some folders as a run reads them; counts what is passed over."""
    from trainer.folder import walk

    for path in given:
        yield from (path / name for name in walk(path, "", skipped)) if path.is_dir() else [path]


def parser(program: str, description: str | None) -> Parser:
    """A command line that begins with a run, and the options of every program that uses one."""
    words = Parser(program, description)
    words.add_argument("run", type=Path, metavar="RUN", help="run directory, model.safetensors or step-N.pt")
    words.add_count("--batch-size", 64, "images at a time")
    words.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    return words


def main(arguments: Sequence[str]) -> int:
    """Print the predictions; the exit status is 1 where an image could not be read."""
    words = parser("predict.py", __doc__)
    words.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    words.add_count("--top", 1, "so many classes per image, the likeliest first")
    options = words.parse_args(arguments)
    return guarded(lambda: _predict(options))


def _predict(options: argparse.Namespace) -> int:
    from trainer.folder import say_unused

    classifier, status = load(options.run, options.device), 0
    skipped: collections.Counter[str] = collections.Counter()
    top, paths = min(options.top, len(classifier.classes)), list(files(options.images, skipped))
    say_unused(skipped)
    if not paths:
        raise DatasetError(f"no image is in {', '.join(map(str, options.images))}: name image files, or their folder.")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", *(name for k in range(1, top + 1) for name in (f"class_{k}", f"probability_{k}"))])
    for names, found in classifier.batches(paths, options.batch_size):
        if isinstance(found, DatasetError):  # the others are classified all the same
            status = refuse(found)
            continue
        values, places = found.softmax(1).topk(top)
        for name, row, index in zip(names, values.tolist(), places.tolist(), strict=True):
            pairs = zip(index, row, strict=True)
            writer.writerow([name, *(cell for k, p in pairs for cell in (classifier.classes[k], f"{p:.4f}"))])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
