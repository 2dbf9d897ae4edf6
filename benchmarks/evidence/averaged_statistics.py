"""Which BatchNorm statistics an averaged (EMA) model is evaluated with, and what that is worth under the term.

    python benchmarks/evidence/averaged_statistics.py --threads 1 --output benchmarks/results/averaged_statistics.json

Runs of methods.py, longer ones. At the end of each the same averaged weights are evaluated with the running
statistics of the last weights (copied, as the FixMatch reference does), with the average of the running statistics (by
the same decay; what the trainers do), and with statistics taken anew from the training images.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path

from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "examples")]
from environment import write_result
from harness import Row, heading, parse, show
from methods import config_of, images, trained

from trainer.evaluation import Evaluated, evaluate, with_fresh_statistics
from trainer.methods import METHODS

COLUMNS = {"variant": "<26", "copied": "8.4f", "averaged": "8.4f", "anew": "8.4f", "lowest_copied": "8.4f"}


def train(method_name: str, seed: int, steps: int, weight: float) -> dict[str, float]:
    """Test accuracy of one run's averaged weights by kind of statistics."""
    data = images()
    model, average, to_model, _ = trained(config_of(method_name, seed, steps, weight))
    copied, anew = copy.deepcopy(average.model), with_fresh_statistics(average.model, data.train_x, to_model)
    copied.load_state_dict(dict(model.named_buffers()), strict=False)  # buffers only
    kinds: dict[str, nn.Module] = {"copied": copied, "averaged": average.model, "anew": anew}
    return {
        kind: evaluate(each, Evaluated(data.test_x, data.test_y), to_model, len(data.classes)).accuracy
        for kind, each in kinds.items()
    }


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="few steps and one seed: shows that it runs, no more")
    made.add_argument("--output", type=Path, help="write rows, setting and environment as JSON")
    made.add_argument("--threads", type=int, default=1, help="torch's threads")
    made.add_argument("--steps", type=int, default=1000, help="of a run")
    made.add_argument("--seeds", type=int, default=3, help="runs of a row")
    made.add_argument("--weight", type=float, default=0.1, help="lambda of the rows with the term")
    made.add_argument(
        "--only", nargs="+", choices=sorted(METHODS), default=["fixmatch", "meanteacher", "temporalensembling"]
    )
    options = parse(made, steps=8, seeds=1)
    setting = {"steps": options.steps, "seeds": options.seeds, "weight": options.weight, "quick": options.quick}
    rows: list[Row] = []
    heading(COLUMNS)
    for name in options.only:
        for weight in (0.0, options.weight):
            runs = [train(name, seed, options.steps, weight) for seed in range(options.seeds)]
            row: Row = {"variant": name + (" + GGCR" if weight else ""), "runs": runs}
            row |= {kind: statistics.mean(run[kind] for run in runs) for kind in runs[0]}
            row["lowest_copied"] = min(run["copied"] for run in runs)
            rows.append(row)
            show([row], COLUMNS)
            if options.output:
                write_result(options.output, {"setting": setting, "rows": rows})


if __name__ == "__main__":
    main()
