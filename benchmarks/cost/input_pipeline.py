"""How fast images are prepared, stage by stage, against the steps that use them.

    python benchmarks/cost/input_pipeline.py --data-dir cifar10-jpeg --threads 1 --clock cpu --output FILE.json

One row a stage: how many images (views, once there are views) it makes for a step, seconds, images per second on one
core. Decoding happens once a run, the rest in every step. `workers`: loader processes that keep up with such a step.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "examples")]
from environment import write_result
from harness import Row, alternate, heading, parse, parser, setting, show, timed

from trainer.augment import STRONG_DRAWS, WEAK_DRAWS, strong_view, weak_view
from trainer.config import Config, preset_config, resolve
from trainer.datasets import Images, load_images
from trainer.loader import StepDataset, ToModel
from trainer.split import choose_labeled
from trainer.step import Trainer
from trainer.streams import Stream, uniform

COLUMNS = {"stage": "<38", "images": "6d", "seconds_median": "10.5f", "images_per_second": "10.0f", "workers": "8.2f"}


def main() -> None:
    """Measures and prints; with --output also writes."""
    made = parser(__doc__)
    made.add_argument("--data-dir", type=Path, required=True, help="folder data set, as the trainer's --data-dir")
    made.add_argument("--arch", default="wrn-28-2")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--unlabeled-ratio", type=int, default=7)
    made.add_argument("--rounds", type=int, default=9, help="of every stage")
    made.add_argument("--step-rounds", type=int, default=3, help="of the training steps")
    options = parse(made, rounds=2, step_rounds=1, arch="wrn-10-1", batch_size=2, unlabeled_ratio=2)
    clock = options.clock
    read: list[Any] = []
    folder = Config(dataset="folder", data_dir=str(options.data_dir))
    seconds = timed(lambda: read.append(load_images(folder)), clock, "cpu")
    images: Images = read[0]
    classes, decoded = images.classes, len(images.train_y) + len(images.test_y)
    rows: list[Row] = [_row("decode (once a run)", decoded, {"seconds_median": seconds})]

    base = dataclasses.replace(
        preset_config("paper"), dataset="folder", labels=10 * len(classes), arch=options.arch, device=options.device,
        batch_size=options.batch_size, unlabeled_ratio=options.unlabeled_ratio,
    )  # fmt: skip
    device = torch.device(options.device)
    to_model = ToModel(*images.channel_statistics, device, channels_last=False)
    calls, counts = _stages(images, base, to_model)
    timing = alternate(calls, options.rounds, clock=clock, device=options.device)
    rows += [_row(name, counts[name], timing.row(name)) for name in calls]

    calls = _steps(images, base, to_model)
    timing = alternate(calls, options.step_rounds, clock=clock, device=options.device)
    rows += [_row(name, counts["a step's images (randaugment)"], timing.row(name)) for name in calls]
    prepared = next(row for row in rows if row["stage"] == "a step's images (randaugment)")["seconds_median"]
    for row in rows[-len(calls) :]:
        row["workers"] = prepared / row["seconds_median"]
    heading(COLUMNS)
    show(rows, COLUMNS)
    if options.output:
        names = ("arch", "batch_size", "unlabeled_ratio", "rounds", "step_rounds")
        size = list(images.train_x.shape[1:3])
        write_result(options.output, {"setting": setting(options, *names) | {"image_size": size}, "rows": rows})


def _row(stage: str, images: int, times: dict[str, Any]) -> Row:
    return {"stage": stage, "images": images, **times, "images_per_second": images / times["seconds_median"]}


def _stages(images: Images, base: Config, to_model: ToModel) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What happens in every step, each stage alone and then all together; and how many images each makes."""
    config = resolve(base)
    split = choose_labeled(images, config)
    loaders = {
        strong: StepDataset(images, split, dataclasses.replace(config, strong=strong))
        for strong in ("randaugment", "fixmatch")
    }
    few, many = config.batch_size, loaders["fixmatch"].unlabeled_batch
    pixels = images.train_x[: few + many].numpy()
    weak = uniform(0, Stream.WEAK_VIEW, 0, few + many, WEAK_DRAWS)
    strong = uniform(0, Stream.STRONG_VIEW, 0, many, STRONG_DRAWS)
    step = loaders["fixmatch"][0]

    def draw() -> None:
        for stream, number, columns in (
            (Stream.LABELED_VIEW, few, WEAK_DRAWS), (Stream.WEAK_VIEW, many, WEAK_DRAWS),
            (Stream.STRONG_VIEW, many, STRONG_DRAWS),
        ):  # fmt: skip
            uniform(0, stream, 0, number, columns)

    calls: dict[str, Callable[[], object]] = {
        "random numbers": draw,
        "weak views": lambda: weak_view(pixels, weak, flip=True),
        "strong views (randaugment)": lambda: strong_view(pixels[:many], strong, "randaugment", flip=True),
        "strong views (fixmatch)": lambda: strong_view(pixels[:many], strong, "fixmatch", flip=True),
        "a step's images (randaugment)": lambda: loaders["randaugment"][0],
        "a step's images (fixmatch)": lambda: loaders["fixmatch"][0],
        "normalise": lambda: to_model.batch(step),
    }
    counts = dict.fromkeys(calls, few + 2 * many)
    return calls, counts | {"weak views": few + many} | dict.fromkeys(list(calls)[2:4], many)


def _steps(images: Images, base: Config, to_model: ToModel) -> dict[str, Callable[[], object]]:
    """A training step without the term, and with it for every pair."""
    calls: dict[str, Callable[[], object]] = {}
    for name, changes in (
        ("training step", {"ggcr_weight": 0.0}),
        ("training step with the term", {"ggcr_warmup": 0, "ggcr_gate": "all"}),
    ):
        config = resolve(dataclasses.replace(base, **changes))
        batch = StepDataset(images, choose_labeled(images, config), config)[0]
        trainer = Trainer.fresh(config, len(images.classes), to_model, len(images.train_y))
        calls[name] = lambda trainer=trainer, batch=batch: trainer.train_step(lambda: batch)  # type: ignore[misc]
    return calls


if __name__ == "__main__":
    main()
