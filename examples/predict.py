"""Classify images with a trained model, and print one CSV line per image.

Examples:
    python predict.py runs/first photo.jpg holiday/
    python predict.py runs/first holiday/ --top 3 > predictions.csv

From Python, `predict.load("runs/first")` gives a function from image files to probabilities, with the preprocessing as
its method `preprocess`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import DatasetError, OptionError, TrainerError, refuse
from trainer.launch import missing

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn


class Classifier:
    """A trained model with the preprocessing that belongs to it.

    Args:
        model: In eval mode.
        about: What the run says about it.
        device: Where to compute.

    Attributes:
        classes: Class names, in the order of the probabilities.
        size: Height and width of the images that the model takes.
    """

    def __init__(self, model: nn.Module, about: dict[str, Any], device: str = "cpu") -> None:
        import torch

        from trainer.loader import ToModel

        self.model, self.about, self.classes = model.to(device), about, list(about["classes"])
        self.size: tuple[int, int] = tuple(about["image_size"])
        self.to_model = ToModel(about["mean"], about["std"], torch.device(device))

    def pixels(self, image: Image.Image | Path | str) -> Tensor:
        """An image as the run saw it: upright RGB, scaled and cut to its size, uint8 `[H, W, 3]`."""
        import numpy as np
        import torch

        from trainer.images import fit, read_image, to_rgb

        rgb = read_image(Path(image)) if isinstance(image, str | Path) else to_rgb(image)
        height, width = self.size
        if rgb.size != (width, height) or int(self.about.get("shorter_side", height)) != height:
            if height != width:
                raise DatasetError(
                    f"the model takes images of {width}x{height}, and one is {rgb.size}: resize it first."
                )
            rgb = fit(rgb, int(self.about.get("shorter_side", height)), height)
        return torch.from_numpy(np.array(rgb))

    def preprocess(self, image: Image.Image | Path | str) -> Tensor:
        """An image as the network takes it: normalised, `[3, H, W]`."""
        return self.to_model.images(self.pixels(image)[None])[0]

    def __call__(self, images: Sequence[Image.Image | Path | str]) -> Tensor:
        """Probabilities `[N, K]` of some images."""
        import torch

        with torch.no_grad():
            x = self.to_model.images(torch.stack([self.pixels(image) for image in images]))
            return self.model(x).float().softmax(1).cpu()


def load(run: Path | str, device: str = "cpu") -> Classifier:
    """Load what a run trained.

    Args:
        run: Its directory, finished or not, its `model.safetensors`, or a checkpoint `step-N.pt` in it.
        device: Where to compute.

    Returns:
        The classifier.
    """
    from trainer.weights import load_model

    return Classifier(*load_model(run), device)


def files(given: Iterable[Path]) -> Iterator[Path]:
    """The images among some files and in some folders, sub-folders included, sorted."""
    from trainer.folder import SUFFIXES

    for path in given:
        if path.is_dir():
            found = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
            yield from (p for p in found if not p.is_dir())
        else:
            yield path


def main(arguments: Sequence[str]) -> int:
    """Print the predictions.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit status: 1 where an image could not be read.
    """
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, model.safetensors or step-N.pt")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=1, help="so many classes per image, the likeliest first; default: 1")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    options = parser.parse_args(arguments)
    try:
        return _predict(options)
    except ModuleNotFoundError as error:
        return missing(error)
    except BrokenPipeError:  # the reader, such as `head`, has enough
        sys.stderr.close()  # else Python complains about it at its end
        return 0
    except (TrainerError, OSError) as error:
        return refuse(error)


def _predict(options: argparse.Namespace) -> int:
    if options.batch_size < 1 or options.top < 1:
        raise OptionError(f"--batch-size and --top must be above 0; found {options.batch_size} and {options.top}.")
    classifier, status = load(options.run, options.device), 0
    batch: list[Path] = []
    top = min(options.top, len(classifier.classes))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", *(name for k in range(1, top + 1) for name in (f"class_{k}", f"probability_{k}"))])

    def flush() -> None:
        if batch:
            values, places = classifier(batch).topk(top)
            for path, row, index in zip(batch, values.tolist(), places.tolist(), strict=True):
                pairs = zip(index, row, strict=True)
                writer.writerow([path, *(cell for k, p in pairs for cell in (classifier.classes[k], f"{p:.4f}"))])
            batch.clear()

    for path in files(options.images):
        try:
            classifier.pixels(path)
        except DatasetError as error:  # the others are classified all the same
            status = refuse(error)
            continue
        batch.append(path)
        if len(batch) == options.batch_size:
            flush()
    flush()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
