"""How much of a run's test accuracy hangs on BatchNorm's running statistics: as stored, and taken anew.

    python benchmarks/reestimate_statistics.py runs/a runs/b --output benchmarks/results/real_images_statistics.json

For the last checkpoint of each run, evaluates the trained and the averaged (EMA) weights twice: with the running
statistics that the checkpoint holds, and with statistics taken anew, by one pass in train mode over training images
without their labels.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from environment import write_result
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from recipes.checkpoint import load_latest
from recipes.config import Config
from recipes.datasets import Images, load_images
from recipes.evaluation import evaluate
from recipes.loader import ToModel
from recipes.models import build_model

IMAGES, BATCH = 6000, 200


def main() -> None:
    """Evaluates every run, prints the table, writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    images: Images | None = None
    for folder in options.runs:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = Config(**stored["options"])
        images = images or load_images(config)
        state = load_latest(folder / "checkpoints")
        if state is None:
            raise SystemExit(f"{folder} has no checkpoint")
        mean, deviation = images.channel_statistics()
        to_model = ToModel(mean, deviation, torch.device("cpu"), channels_last=config.channels_last)
        for weights, tensors in (("trained", _model_of(state["method"])), ("averaged", state["average"]["model"])):
            model = build_model(config.arch, len(images.classes), momentum=0.1)
            model.load_state_dict(tensors)
            model.eval()
            row = {"label": stored["label"], "weights": weights}
            row["stored"] = evaluate(model, images.test_x, images.test_y, to_model)["test_accuracy"]
            take_anew(model, images.train_x, to_model)
            row["anew"] = evaluate(model, images.test_x, images.test_y, to_model)["test_accuracy"]
            print(
                f"{row['label']:14s} {weights:9s} stored {row['stored']:.4f}   taken anew {row['anew']:.4f}", flush=True
            )
            rows.append(row)
    if options.output:
        write_result(options.output, {"images": IMAGES, "rows": rows})


def _model_of(method: dict[str, Any]) -> dict[str, Tensor]:
    """The model's part of a method's (or the wrapper's) state."""
    return {key.split("model.", 1)[1]: value for key, value in method.items() if "model." in key}


def take_anew(model: nn.Module, pixels: Tensor, to_model: ToModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain average over the batches
    model.train()
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:IMAGES]
    with torch.no_grad():
        for rows in chosen.split(BATCH):
            model(to_model.images(pixels[rows]))
    model.eval()


if __name__ == "__main__":
    main()
