"""Which photographs are labeled: a balanced draw, or a list of file names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import DatasetError, OptionError
from trainer.imagenet.config import ImageNetConfig
from trainer.imagenet.files import PhotographFolder, Photographs
from trainer.split import Split, draw_labeled, draw_split, make_split


def choose_labeled(photographs: PhotographFolder, config: ImageNetConfig) -> Split:
    """The labeled photographs that `--labels`, `--label-fraction` or `--label-file` ask for.

    Args:
        photographs: The data set.
        config: Resolved options.

    Returns:
        The split.

    Raises:
        OptionError: Fewer labels than classes, or more than there are images.
        DatasetError: The list cannot be read, or names what is not there.
    """
    if config.label_file is not None:
        return make_split(photographs, read_list(Path(config.label_file), photographs.train))
    if config.labels:
        return draw_split(photographs, config.labels, config.seed)
    sizes = torch.bincount(photographs.train_y, minlength=len(photographs.classes))
    per_class = (sizes * config.label_fraction).round().long().clamp(min=1)
    return make_split(photographs, draw_labeled(photographs, per_class.tolist(), config.seed))


def read_list(path: Path, photographs: Photographs) -> Tensor:
    """Read a list of labeled photographs, such as the published ones of 1 % and 10 % of ImageNet.

    Args:
        path: Text, one name a line: `n01440764_10026.JPEG`, `n01440764/n01440764_10026.JPEG` or a longer path that
            ends like this. Empty lines do not count.
        photographs: The training photographs.

    Returns:
        Their indices.

    Raises:
        DatasetError: The file cannot be read, names an image twice, or one that is not there or not the only one of
            its name.
        OptionError: A class has no labeled image.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"--label-file {path} cannot be read ({error}): give a text file of image names.") from error
    by_name: dict[str, list[int]] = {}
    for index in range(len(photographs)):
        by_name.setdefault(photographs.name(index), []).append(index)
    numbers = {name: number for number, name in enumerate(photographs.classes)}
    found: dict[int, int] = {}
    for line, text in enumerate(lines, 1):
        if not text:
            continue
        where, parts = f"--label-file {path}, line {line}: {text!r}", Path(text).parts
        candidates = by_name.get(parts[-1], [])
        if len(parts) > 1:
            candidates = [index for index in candidates if int(photographs.y[index]) == numbers.get(parts[-2])]
        if not candidates:
            raise DatasetError(
                f"{where} is no training image of {photographs.folder}: write the names that the files have there."
            )
        if len(candidates) > 1:
            raise DatasetError(f"{where} is the name of images of several classes: write CLASS/NAME.")
        if candidates[0] in found:
            raise DatasetError(f"{where} is the image of line {found[candidates[0]]}, too: name each once.")
        found[candidates[0]] = line
    chosen = torch.tensor(sorted(found), dtype=torch.int64)
    counts = torch.bincount(photographs.y[chosen], minlength=len(photographs.classes))
    empty = [name for name, count in zip(photographs.classes, counts.tolist(), strict=True) if not count]
    if empty:
        raise OptionError(
            f"--label-file {path} names {len(chosen)} images of {len(numbers) - len(empty)} of the {len(numbers)} "
            f"classes, none of {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}: "
            "name at least one of each, or remove the class."
        )
    return chosen
