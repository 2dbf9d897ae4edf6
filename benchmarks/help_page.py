"""docs/does-it-help.md from the grids' tables and benchmarks/results/term_dynamics.json."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from recipes.runlog import shown
from recipes.statistics import paired_difference, spread
from recipes.tabletext import markdown

Result = dict[str, Any]

# The command behind each grid; options behind the -- are the trainer's.
GRIDS = {
    "help_four": (
        "Four classes of CIFAR-10 (JPEG copy), 40 labels",
        "python examples/reproduce.py --budget photos -- --data-dir cifar10-jpeg-4",
    ),
    "help_ten": (
        "All ten classes, 250 labels",
        "python examples/reproduce.py --table main --budget photos --output runs/ten"
        " -- --data-dir cifar10-jpeg --labels 250 --threshold 0.6",
    ),
    "help_digits": (
        "Digits, 40 labels",
        "python examples/reproduce.py --table main ablation lambda curves --budget demo --seeds 10",
    ),
}
_QUANTITIES = {
    "mask": "confident", "cosine": "GC", "cosine_all": "GC, every pair", "weak": "norm, weak", "strong": "norm, strong",
    "degenerate": "degenerate", "ratio": "L_g / rest", "against_u": "L_g, L_u", "against_s": "L_g, L_s",
    "step_gain": "gain / promise",
}  # fmt: skip


def finals(result: Result) -> dict[str, dict[int, float]]:
    """Variant, seed to the accuracy in the end, in per cent."""
    found: dict[str, dict[int, float]] = {}
    for run in result["runs"]:
        found.setdefault(run["variant"], {})[run["seed"]] = run["accuracies"][-1]
    return found


def difference(result: Result, variant: str, reference: str = "fixmatch") -> str:
    """Paired difference in points with its interval: `+0.3 [-1.2, +1.8]`."""
    ends = finals(result)
    found = paired_difference(ends.get(variant, {}), ends.get(reference, {}))
    if found is None:
        return "not run"
    interval = "" if found.low is None else f" [{found.low:+.1f}, {found.high:+.1f}]"
    return f"{found.mean:+.1f}{interval}"


def mean(result: Result, variant: str) -> str:
    """Mean accuracy and deviation: `57.1 ± 1.2`."""
    found = spread(list(finals(result)[variant].values()))
    return f"{found.mean:.1f}" + ("" if found.sd is None else f" ± {found.sd:.1f}")


def hours(results: Iterator[Result]) -> float:
    """Of training, over all runs."""
    return sum(run["seconds"] or 0.0 for result in results for run in result["runs"]) / 3600


def tables(result: Result, level: int = 3) -> str:
    """The grid's tables; versions are in the file."""
    places = [{key: value for key, value in place.items() if key != "gradconsist"} for place in result["environments"]]
    return markdown({**result, "environments": places}, level=level)


def dynamics_table(result: Result) -> str:
    """Medians by variant and quarter of the run."""
    lines = [
        "| run | quarter | " + " | ".join(_QUANTITIES.values()) + " |",
        "| --- | ---: |" + " ---: |" * len(_QUANTITIES),
    ]
    for row in result["summary"]:
        numbers = ["-" if row[name] is None else f"{row[name]:.3f}" for name in _QUANTITIES]
        lines.append(f"| {row['variant']} | {row['quarter']} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def options_line(result: Result) -> str:
    """The protocol of a grid in one line."""
    protocol = next(iter(result["protocol"].values()))["options"]
    names = ("arch", "image_size", "labels", "steps", "batch_size", "unlabeled_ratio", "threshold", "strong",
             "ggcr_warmup", "lr", "ema", "bn_momentum")  # fmt: skip
    return ", ".join(f"`{name}` {shown(protocol[name])}" for name in names)
