"""The main job in a few minutes on a laptop, without a network: three methods on embedded handwritten digits.

Trains on 40 labeled digits, with the same budget of steps each: supervised only, FixMatch, and FixMatch with
gradient consistency (GGCR). Prints a table and draws `curves.png`. Interrupt and repeat it as you like: finished
runs are kept, an unfinished one continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.launch import Parser, guarded

METHODS: dict[str, dict[str, Any]] = {
    "supervised": {"method": "supervised"},
    "fixmatch": {"method": "fixmatch", "ggcr_weight": 0.0},
    "fixmatch+ggcr": {"method": "fixmatch"},
}


def main(arguments: Sequence[str]) -> int:
    """Train all methods, then report; returns the exit status."""
    words = Parser("demo.py", __doc__)
    words.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the runs")
    words.add_count("--seeds", 1, "runs of each method, with seeds 0, 1, ...")
    words.add_argument("--steps", type=int, help="steps of each run; default: the demo preset's")
    options = words.parse_args(arguments)
    return guarded(lambda: _demo(options))


def _demo(options: argparse.Namespace) -> int:
    import torch

    from trainer.config import preset_config
    from trainer.panels import draw_curves, table
    from trainer.runs import read_run
    from trainer.training import main as train

    # Images of 8x8 pixels are too small to share between threads: one is faster than two, and much faster where
    # something else keeps a core busy.
    torch.set_num_threads(1)
    folders = []
    for seed in range(options.seeds):
        for name, changes in METHODS.items():
            steps = {} if options.steps is None else {"steps": options.steps}
            output = str(options.output / f"{name}-seed{seed}")
            config = dataclasses.replace(preset_config("demo"), seed=seed, output=output, **changes, **steps)
            print(f"\n== {name}, seed {seed}", flush=True)
            status = train(config)
            if status:
                return status
            folders.append(Path(str(config.output)))
    runs = [read_run(folder) for folder in folders]
    print(f"\n{table(runs)}\n")
    draw_curves(runs, options.output / "curves.png")
    print(f"curves: {options.output / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
