"""How much of a run's test accuracy hangs on BatchNorm's running statistics: as stored, and taken anew.

    python benchmarks/evidence/reestimate_statistics.py runs/a runs/b --output FILE.json

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
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "examples")]
from environment import write_result

from trainer.checkpoint import load_latest
from trainer.config import Config
from trainer.datasets import DataSet, Images, load_images
from trainer.evaluation import Evaluated, evaluate, with_fresh_statistics
from trainer.loader import ToModel
from trainer.models import build_model


def main() -> None:
    """Evaluates every run, prints the table, writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    images: DataSet | None = None
    for folder in options.runs:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = Config(**stored["options"])
        images = images or load_images(config)
        assert isinstance(images, Images)
        state = load_latest(folder / "checkpoints")
        if state is None:
            raise SystemExit(f"{folder} has no checkpoint")
        mean, deviation = images.channel_statistics
        to_model = ToModel(mean, deviation, torch.device("cpu"), channels_last=config.channels_last)
        for weights, tensors in (("trained", _model_of(state["method"])), ("averaged", state["average"]["model"])):
            model = build_model(config.arch, len(images.classes), momentum=0.1)
            model.load_state_dict(tensors)
            model.eval()
            row = {"run": folder.name, "label": stored["label"], "weights": weights}
            row["stored"] = evaluate(
                model, Evaluated(images.test_x, images.test_y), to_model, len(images.classes)
            ).accuracy
            fresh = with_fresh_statistics(model, images.train_x, to_model)
            row["anew"] = evaluate(
                fresh, Evaluated(images.test_x, images.test_y), to_model, len(images.classes)
            ).accuracy
            print(
                f"{row['run']:40s} {weights:9s} stored {row['stored']:.4f}   taken anew {row['anew']:.4f}", flush=True
            )
            rows.append(row)
    if options.output:
        write_result(options.output, {"setting": {}, "rows": rows})


def _model_of(method: dict[str, Any]) -> dict[str, Tensor]:
    """The model's part of a method's (or the wrapper's) state."""
    return {key.split("model.", 1)[1]: value for key, value in method.items() if "model." in key}


if __name__ == "__main__":
    main()
