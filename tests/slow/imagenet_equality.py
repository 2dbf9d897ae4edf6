"""Whether a step of several processes is the step of one process with the joined batch, on photographs.

    torchrun --standalone --nproc-per-node 2 tests/slow/imagenet_equality.py --data-dir photos --output FILE.json

The trainer of `fixmatch_imagenet.py` takes its steps on all processes. Beside it, process 0 takes each step alone, with
the whole batch, from the same weights, and the two gradients are compared. With GroupNorm they must agree to within
rounding; with BatchNorm, whose statistics are each process's own, they do not, which shows that the comparison sees a
difference.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks/shared", "examples")]
from environment import write_result
from harness import Row, flat_gradient, heading, parse, parser, setting, show

from trainer.config import IMAGENET, resolve
from trainer.datasets import load_images
from trainer.loader import ToModel, batches_of
from trainer.models import build_network
from trainer.processes import Processes, join, leave
from trainer.split import choose_labeled
from trainer.step import Trainer

COLUMNS = {
    "norm": "<8",
    "step": "4d",
    "pairs": "5.0f",
    "loss_alone": "12.8f",
    "loss": "12.8f",
    "gradient_error": "10.2e",
}


def main() -> None:
    """Takes a few steps with each normalisation."""
    made = parser(__doc__)
    made.add_argument("--data-dir", required=True)
    made.add_argument("--arch", default="resnet50")
    made.add_argument("--image-size", type=int, default=64)
    made.add_argument("--batch-size", type=int, default=2)
    made.add_argument("--steps", type=int, default=3, help="the first one is without the term")
    made.add_argument("--norms", nargs="+", default=["group", "batch"])
    options = parse(made, arch="resnet18", steps=2)
    processes = join(options.device)
    rows: list[Row] = []
    if processes.first:
        heading(COLUMNS)
    for norm in options.norms:
        for row in _compared(options, norm, processes):
            rows.append(row)
            if processes.first:
                show([row], COLUMNS)
                if options.output:
                    used = setting(options, "arch", "image_size", "batch_size", "steps") | {
                        "processes": processes.world
                    }
                    write_result(options.output, {"setting": used, "rows": rows})
    leave()


def _compared(options: Any, norm: Any, processes: Processes) -> list[Row]:
    """A row for each step; without losses and errors on the other processes."""
    given = dataclasses.replace(
        IMAGENET["paper"], data_dir=options.data_dir, arch=options.arch, image_size=options.image_size,
        batch_size=options.batch_size,
        unlabeled_ratio=2, threshold=0.0, unlabeled_ramp=0, steps=options.steps + 1, lr=1e-3, lr_warmup=1,
        ggcr_warmup=1, ggcr_weight=1.0, norm=norm,
    )  # fmt: skip
    config = resolve(given, processes.world)
    folder = load_images(config)
    split = choose_labeled(folder, config)
    to_model = ToModel([0.5] * 3, [0.25] * 3, processes.device, channels_last=False)
    torch.manual_seed(0)
    network = build_network(config, len(folder.classes), processes)
    single = Processes(0, 1, 1, processes.device)
    alone = Trainer(config, copy.deepcopy(network), to_model, 0, single) if processes.first else None
    trainer = Trainer(config, network, to_model, 0, processes)
    parts, whole = (batches_of(folder, split, config, who) for who in (processes, single))
    rows = []
    for step in range(options.steps):
        row: Row = {"norm": norm, "step": step, "reason": None}
        if alone is not None:
            alone.model.load_state_dict(trainer.model.state_dict())
            alone.train_step(lambda step=step: whole[step])  # type: ignore[misc]
        trainer.train_step(lambda step=step: parts[step])  # type: ignore[misc]
        if alone is not None:
            one, both = flat_gradient(alone.model), flat_gradient(trainer.model)
            row["gradient_error"] = float((one - both).norm() / one.norm())
            row["loss_alone"], row["loss"] = (float(t.meter.values["loss"][-1]) for t in (alone, trainer))
            row["pairs"] = float(alone.meter.values["ggcr_pairs"][-1]) if step else 0.0
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
