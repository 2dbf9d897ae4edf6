"""Every semi-supervised method of the library, plain and with gradient consistency, on embedded digits.

    python benchmarks/evidence/methods.py --output benchmarks/results/methods.json

A fixed, small budget: the demo preset's data (40 labels; 20 labeled and 40 unlabeled images a step for every method), a
small convolutional network, and each method's own defaults; supervised beside them. The term compares at most 8 pairs
of every second step, after a quarter of the steps. One row a method and variant with the test accuracies of the
averaged (EMA) model, seed by seed. Rows are written as they are finished, and a second call goes on with those that
are missing. Times are processor time of the steps after the warm-up.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "examples")]
from environment import write_result
from harness import Row, parse, show

from trainer.config import Config, preset_config, resolve
from trainer.datasets import Images, load_images
from trainer.evaluation import Evaluated, evaluate
from trainer.loader import StepDataset, StepImages, ToModel
from trainer.methods import METHODS, build_method
from trainer.optimizer import AveragedModel, build_optimizer, set_learning_rate
from trainer.split import choose_labeled

COLUMNS = {"variant": "<26", "mean": "8.4f", "spread": "8.4f", "milliseconds": "8.1f", "ratio": "6.2f"}


class SmallNet(nn.Module):
    """Two convolutions with BatchNorm as encoder, a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32 * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        """From images [B, 3, 8, 8] to logits [B, C]."""
        return self.head(self.encoder(x))


def config_of(method: str, seed: int, steps: int, weight: float) -> Config:
    """The demo preset's options with a budget of `steps`; two unlabeled images a labeled one for every method."""
    changes: dict[str, Any] = {
        "method": method, "seed": seed, "steps": steps, "unlabeled_ratio": 2, "ggcr_weight": weight,
        "ggcr_warmup": steps // 4, "ggcr_max_pairs": 8, "lr": 0.1,
    }  # fmt: skip
    if method not in ("mixmatch", "meanteacher", "pimodel", "temporalensembling", "pseudolabel"):
        changes["unlabeled_ramp"] = steps // 4
    return resolve(dataclasses.replace(preset_config("demo"), **changes))


@functools.cache
def images() -> Images:
    found = load_images(config_of("supervised", 0, 100, 0.0))
    assert isinstance(found, Images)
    return found


@functools.cache
def batches(strong: str, seed: int, steps: int) -> list[StepImages]:
    """A run's batches: they depend on the seed and the strong view only, so methods share them."""
    config = dataclasses.replace(config_of("fixmatch", seed, steps, 0.0), strong=strong)  # type: ignore[arg-type]
    dataset = StepDataset(images(), choose_labeled(images(), config), config)
    return [dataset[step] for step in range(steps)]


def train(config: Config) -> tuple[float, float]:
    """One run.

    Returns:
        Test accuracy of the averaged model, and seconds of a step after the warm-up.
    """
    data = images()
    _, average, to_model, seconds = trained(config)
    accuracy = evaluate(average.model, Evaluated(data.test_x, data.test_y), to_model, len(data.classes)).accuracy
    return float(accuracy), seconds / (config.steps - config.ggcr_warmup)


def trained(config: Config) -> tuple[nn.Module, AveragedModel, ToModel, float]:
    """One run: the network, its average, what normalises its images, and seconds of all steps after the warm-up."""
    data = images()
    to_model = ToModel(*data.channel_statistics, torch.device("cpu"), channels_last=False)
    torch.manual_seed(config.seed)
    model = SmallNet(len(data.classes))
    method = build_method(model, config, len(data.train_y)).train()
    optimizer = build_optimizer(model, lr=float(config.lr or 0), weight_decay=float(config.weight_decay or 0.0))
    average = AveragedModel(model, config.ema, warmup=bool(config.ema_warmup))
    seconds = 0.0
    for step, batch in enumerate(batches(str(config.strong), config.seed, config.steps)):
        inputs = to_model.batch(batch)
        set_learning_rate(optimizer, float(config.lr or 0), step, config.steps)
        start = time.process_time()
        optimizer.zero_grad()
        method(inputs).loss.backward()
        optimizer.step()
        if step >= config.ggcr_warmup:
            seconds += time.process_time() - start
        average.update(model)
    return model, average, to_model, seconds


def row(method: str, weight: float, seeds: int, steps: int) -> Row:
    """The runs of a method, plain or with the term."""
    runs = [train(config_of(method, seed, steps, weight)) for seed in range(seeds)]
    accuracies = [accuracy for accuracy, _ in runs]
    return {
        "method": method,
        "variant": method + (" + GGCR" if weight else ""),
        "accuracies": accuracies,
        "mean": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if seeds > 1 else 0.0,
        "milliseconds": 1000 * statistics.median(seconds for _, seconds in runs),
    }


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="few steps and one seed: shows that it runs, no more")
    made.add_argument("--output", type=Path, help="write rows, setting and environment as JSON, and go on from there")
    made.add_argument("--threads", type=int, default=1, help="torch's threads")
    made.add_argument("--steps", type=int, default=200, help="of a run")
    made.add_argument("--seeds", type=int, default=3, help="runs of a row")
    made.add_argument("--weight", type=float, default=0.1, help="lambda of the rows with the term")
    made.add_argument("--only", nargs="+", choices=sorted(METHODS), default=sorted(METHODS), help="methods")
    options = parse(made, steps=8, seeds=1)
    setting = {
        "steps": options.steps, "seeds": options.seeds, "weight": options.weight, "labels": 40, "clock": "cpu",
        "quick": options.quick,
    }  # fmt: skip
    done = {found["variant"]: found for found in _finished(options.output, setting)}
    plain = [(method, 0.0) for method in options.only]
    with_term = [(method, options.weight) for method in options.only if method != "supervised"]
    for method, weight in plain + with_term:
        variant = method + (" + GGCR" if weight else "")
        if variant in done:
            continue
        done[variant] = row(method, weight, options.seeds, options.steps)
        if weight:
            done[variant]["ratio"] = done[variant]["milliseconds"] / done[method]["milliseconds"]
        show([done[variant]], COLUMNS)
        if options.output:
            write_result(options.output, {"setting": setting, "rows": [done[name] for name in sorted(done)]})


def _finished(path: Path | None, setting: dict[str, Any]) -> list[Row]:
    """Rows of an earlier call with the same setting."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return list(found["rows"]) if found["setting"] == setting else []


if __name__ == "__main__":
    main()
