r"""Turns finished run directories of the trainer into a result file and a picture that the docs can show.

    python benchmarks/evidence/collect_runs.py runs/a runs/b --name real_images \
        --command "python examples/fixmatch_cifar.py ..."

Writes benchmarks/results/NAME.json (options, environment, curves, summaries; no paths) and docs/assets/NAME.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks/shared", "examples")]
from environment import write_result

from trainer.panels import draw_curves, table
from trainer.runs import read_run

PATHS = {"data_dir", "output"}
TRAINED = (
    "mask_rate", "confident_accuracy", "ggcr_loss", "ggcr_cosine", "ggcr_degenerate", "ggcr_pairs",
    "loss_scale", "skipped",
)  # fmt: skip


def main() -> None:
    """Collects, prints the table, writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--name", required=True, help="of the result file and the picture")
    parser.add_argument("--command", required=True, help="that made the runs, as a reader would type it")
    parser.add_argument("--title", help="of the picture")
    options = parser.parse_args()
    runs = [read_run(folder) for folder in options.runs]
    print(table(runs))
    (ROOT / "docs" / "assets").mkdir(exist_ok=True)
    draw_curves(runs, ROOT / "docs" / "assets" / f"{options.name}.png", title=options.title)
    write_result(
        ROOT / "benchmarks" / "results" / f"{options.name}.json",
        {"made_by": options.command, "runs": [_record(folder) for folder in options.runs]},
    )


def _record(folder: Path) -> dict[str, Any]:
    run = read_run(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "label": run.label,
        "options": {key: value for key, value in run.options.items() if key not in PATHS},
        "environment": stored["environment"],
        "split": json.loads((folder / "split.json").read_text(encoding="utf-8"))["sha256"],
        "evaluations": [
            {"step": step, "test_accuracy": accuracy} for step, accuracy in zip(run.steps, run.accuracies, strict=True)
        ],
        "training": _thinned([{key: line[key] for key in ("step", *TRAINED) if key in line} for line in train]),
        "summary": run.summary,
    }


def _thinned(lines: list[dict[str, Any]], most: int = 40) -> list[dict[str, Any]]:
    """At most so many of the lines, evenly spread, the last among them."""
    stride = -(-len(lines) // most)
    return lines[::-1][::stride][::-1]


if __name__ == "__main__":
    main()
