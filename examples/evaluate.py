"""Test a trained model on any folder of images: accuracy, accuracy per class, and the confusion matrix as a picture.

Examples:
    python evaluate.py runs/first photos/test
    python evaluate.py runs/first/checkpoints/step-00001000.pt photos/test --output confusion.png
"""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Sequence
from pathlib import Path

from predict import files, load, parser
from trainer.errors import DatasetError, OptionError
from trainer.launch import guarded


def main(arguments: Sequence[str]) -> int:
    """Print the accuracies and draw the matrix; returns the exit status."""
    words = parser("evaluate.py", __doc__)
    words.add_argument("folder", type=Path, metavar="FOLDER", help="holds one directory per class")
    words.add_argument("--output", type=Path, metavar="FILE.png", help="picture of the confusion matrix")
    words.add_argument("--skip-damaged", action="store_true", help="leave out files that cannot be read")
    options = words.parse_args(arguments)
    return guarded(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> int:
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from trainer.evaluation import Scores
    from trainer.folder import class_folders, say_unused
    from trainer.images import damaged

    kinds = sorted(FigureCanvasAgg.filetypes)
    if options.output and options.output.suffix[1:].lower() not in kinds:
        raise OptionError(f"--output {options.output}: the name must end in one of .{', .'.join(kinds)}.")
    if not options.folder.is_dir():
        raise DatasetError(f"{options.folder} is not a directory: expected one that holds one directory per class.")
    classifier = load(options.run, options.device)
    numbers = {name: k for k, name in enumerate(classifier.classes)}
    skipped: collections.Counter[str] = collections.Counter()
    folders = class_folders(options.folder, skipped)
    unknown = sorted(folders.keys() - numbers.keys())
    if unknown or not folders:
        raise DatasetError(
            f"{options.folder} holds {', '.join(unknown[:5]) or 'no folders'}: the model knows the classes "
            f"{', '.join(classifier.classes[:10])}{', ...' if len(numbers) > 10 else ''}."
        )
    labels: dict[Path, int] = {}
    for name, folder in folders.items():
        members = list(files([options.folder / folder], skipped))
        skipped["class folders without an image"] += not members
        labels |= dict.fromkeys(members, numbers[name])
    say_unused(+skipped)
    bad: dict[int, str] = {}
    confusion, loss, top5 = torch.zeros(len(numbers), len(numbers), dtype=torch.int64), 0.0, 0
    for paths, found in classifier.batches(labels, options.batch_size):
        if isinstance(found, DatasetError):
            bad[len(bad)] = str(found)
            continue
        truth = torch.tensor([labels[path] for path in paths])
        best = found.topk(min(5, len(numbers))).indices
        confusion.index_put_((truth, best[:, 0]), torch.ones(len(truth), dtype=torch.int64), accumulate=True)
        top5 += int((best == truth[:, None]).sum())
        loss += float(torch.nn.functional.cross_entropy(found, truth, reduction="sum"))
    if bad and not options.skip_damaged:
        raise damaged(bad)
    seen = int(confusion.sum())
    if not seen:
        raise DatasetError(f"{options.folder} holds no image that can be read.")
    scores = Scores(confusion, top5 / seen, loss / seen)
    print(f"accuracy {scores.accuracy:.4f}, top-5 {scores.top5:.4f}, loss {scores.loss:.4f}: {seen:,} images", end="")
    print(f", {len(bad)} left out" if bad else "")
    for name, recall, count in zip(classifier.classes, scores.recalls(), confusion.sum(1).tolist(), strict=True):
        if count:
            print(f"{name}: {recall:.4f} of {count:,} images")
    if options.output:
        draw_confusion(scores.confusion.tolist(), classifier.classes, options.output)
        print(f"confusion matrix: {options.output}")
    return 0


def draw_confusion(confusion: list[list[int]], classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix: a row per true class, its shares as shades."""
    from matplotlib.figure import Figure

    from trainer.panels import save_figure

    count = len(classes)
    side = min(3 + 0.45 * count, 24)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    shares = [[value / max(1, sum(row)) for value in row] for row in confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= 60:
        axes.set_xticks(range(count), classes, rotation=90)
        axes.set_yticks(range(count), classes)
    if count <= 20:
        for i, row in enumerate(confusion):
            for j, value in enumerate(row):
                color = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, str(value), ha="center", va="center", color=color)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
