"""What the cost settings of `fixmatch_imagenet.py` cost: its own step, with random images in place of photographs.

    python benchmarks/cost/imagenet_cost.py --threads 1 --clock cpu --output benchmarks/results/imagenet_cost.json

Every row is a process of its own, so that its peak memory is its own; every pair counts (the threshold is 0). A round
is as many steps as `--ggcr-every` says, and the seconds are those of an average step.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks/shared", "examples")]
from environment import write_result
from harness import Row, heading, parse, parser, reason, setting, show
from point import Peak

from trainer.config import IMAGENET, Config, resolve
from trainer.loader import StepImages, ToModel
from trainer.step import Trainer

PLAIN = "--ggcr-weight 0"
# By what the command line says, the options.
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {"ggcr_weight": 0.0},
    "all pairs": {},
    "--ggcr-max-pairs 1": {"ggcr_max_pairs": 1},
    "--ggcr-max-pairs 2": {"ggcr_max_pairs": 2},
    "--ggcr-encoder layer4": {"ggcr_encoder": "layer4"},
    "--ggcr-every 4": {"ggcr_every": 4},
    "--ggcr-max-pairs 2 --ggcr-every 4": {"ggcr_max_pairs": 2, "ggcr_every": 4},
}
COLUMNS = {
    "arch": "<10", "image_size": "4d", "labeled": "4d", "pairs": "4d", "variant": "<36", "seconds": "8.2f",
    "ratio": "6.2f", "peak_mb": "8.0f", "memory_ratio": "6.2f",
}  # fmt: skip


def run(point: dict[str, Any]) -> Row:
    """Seconds of an average step and peak memory of one setting."""
    torch.set_num_threads(point["threads"] or torch.get_num_threads())
    options = {
        "arch": point["arch"], "image_size": point["image_size"], "batch_size": point["labeled"],
        "unlabeled_ratio": point["pairs"] // point["labeled"], "threshold": 0.0, "unlabeled_ramp": 0,
        "ggcr_warmup": 0, "steps": 10**6,
    }  # fmt: skip
    config = resolve(dataclasses.replace(IMAGENET["paper"], **{**options, **SETTINGS[point["variant"]]}))
    to_model = ToModel([0.5] * 3, [0.25] * 3, torch.device("cpu"))
    trainer = Trainer.fresh(config, 1000, to_model, 0)
    images = _images(config)
    read = time.process_time if point["clock"] == "cpu" else time.perf_counter
    peak, seconds = Peak("cpu"), []
    peak.start()  # before the first step: what it frees stays with the process
    trainer.train_step(lambda: images)  # with the term: it probes the network once
    while (trainer.step - config.ggcr_warmup) % config.ggcr_every:
        trainer.train_step(lambda: images)
    for _ in range(point["rounds"]):
        start = read()
        for _ in range(config.ggcr_every):
            trainer.train_step(lambda: images)
        seconds.append((read() - start) / config.ggcr_every)
    return {"seconds": statistics.median(seconds), "seconds_min": min(seconds), "peak_bytes": peak.read()}


def _images(config: Config) -> StepImages:
    pairs = config.batch_size * int(config.unlabeled_ratio or 0)
    sizes = (config.batch_size, pairs, pairs)
    side = int(config.image_size or 0)
    x, weak, strong = (torch.randint(256, (n, side, side, 3)).to(torch.uint8) for n in sizes)
    y, index = torch.arange(config.batch_size), torch.arange(pairs)
    return StepImages(x, y, weak, strong, index, index)


def main() -> None:
    """Measures every setting, at each size."""
    made = parser(__doc__)
    made.add_argument("--arch", default="resnet50")
    made.add_argument("--sizes", nargs="+", type=int, default=[64, 224])
    made.add_argument("--labeled", nargs="+", type=int, default=[2, 1], help="by size")
    made.add_argument("--pairs", nargs="+", type=int, default=[6, 3], help="by size")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--only", nargs="+", help="a part of the settings' names")
    options = parse(made, arch="resnet18", sizes=[32], labeled=[1], pairs=[2], rounds=1)
    rows: list[Row] = []
    heading(COLUMNS)
    for size, labeled, pairs in zip(options.sizes, options.labeled, options.pairs, strict=True):
        base: Row = {}
        for variant in SETTINGS:
            if variant != PLAIN and options.only and not any(part in variant for part in options.only):
                continue
            point = {
                "arch": options.arch, "image_size": size, "labeled": labeled, "pairs": pairs, "variant": variant,
                "rounds": options.rounds, "threads": options.threads, "clock": options.clock,
            }  # fmt: skip
            row = _measured(point)
            base = row if variant == PLAIN else base
            if "seconds" in row and "seconds" in base:
                row["ratio"] = row["seconds"] / base["seconds"]
                row["peak_mb"], row["memory_ratio"] = row["peak_bytes"] / 2**20, row["peak_bytes"] / base["peak_bytes"]
            rows.append(row)
            show([row], COLUMNS)
            if options.output:  # so that a run that is stopped keeps what it has
                used = setting(options, "arch", "sizes", "labeled", "pairs", "rounds", "threads")
                write_result(options.output, {"setting": used, "rows": rows})


def _measured(point: dict[str, Any]) -> Row:
    command = [sys.executable, __file__, "--point", json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shown = {name: point[name] for name in ("arch", "image_size", "labeled", "pairs", "variant")}
    if done.returncode:
        return {**shown, "reason": reason(RuntimeError((done.stderr.splitlines() or ["killed"])[-1]))}
    return {**shown, "reason": None, **json.loads(done.stdout.splitlines()[-1])}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--point"]:
        print(json.dumps(run(json.loads(sys.argv[2]))))
    else:
        main()
