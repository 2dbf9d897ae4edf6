"""docs/does-it-help.md from the grids' tables and benchmarks/results/term_dynamics.json."""

from __future__ import annotations

import sys
from collections.abc import Iterable
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


def hours(results: Iterable[Result]) -> float:
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


def help_page(results: dict[str, Result], dynamics: Result, made: str) -> str:
    """The page.

    Args:
        results: The grids' `tables.json`, by the names in `GRIDS`.
        dynamics: Of benchmarks/term_dynamics.py.
        made: What the page says about its environment.

    Returns:
        Markdown.
    """
    grids = "\n".join(_grid(name, results[name]) for name in GRIDS if name in results)
    runs = sum(result["finished"] for result in results.values())
    return f"""# Does it help?

This page is written by `python benchmarks/make_pages.py` from `benchmarks/results/help_*.json` and
`term_dynamics.json`. The paper claims +1.4 points over FixMatch on CIFAR-10 with 40 labels, an optimum at λ = 0.1, a
gain from the warm-up, a smaller one from a penalty on gradient norms, and faster convergence. No run behind those
numbers is known. These are runs.

## Verdict

{verdict(results, dynamics)}

![Differences to FixMatch](assets/help_four.png)

## Protocol

- **Paired**: seed k has the same labeled split, initial weights, order of images and augmentation in every row; a
  difference is taken seed by seed, and its interval is Student's, 95 %. An interval that holds 0 shows no difference.
- **Small**: a CPU carried this. Images are CIFAR-10's photographs from a lossy JPEG copy, scaled to 16x16 (the digits
  are 8x8); the network is a `wrn-10-1`; a run has a thousand steps or fewer, where the paper has a million. Accuracies
  are therefore far below the paper's, and none is comparable with it; a difference between two rows is what they show.
- **Where FixMatch works**: classes, labels and threshold were chosen on 1,000 held-out training images a class, by
  whether FixMatch beats the labels alone, without a look at the term. Test images decided nothing. Four classes
  (airplane, automobile, bird, cat: the first of CIFAR-10) with 40 labels were such a setting; all ten with 250 labels
  were hardly one in so few steps, and are here because the paper's setting has all ten.
- Accuracy is that of the averaged model, BatchNorm's running statistics averaged with it, after the last step.
- Compute: {hours(results.values()):.1f} hours of training on one core of a CPU, in {runs} runs, beside other work on
  the machine.

{grids}
## Why

Gradients of one run each on the four classes, with the batch that the run is about to take, medians by quarter of the
run. *L_g / rest* is the norm of L_g's gradient over that of L_s + μ L_u; λ times it is the term's part in a step. *L_g,
L_u* is the cosine between those two gradients: below 0, the term pulls against the pseudo-labels. *gain / promise* is
by how much L_g falls in a small step against its gradient, with BatchNorm's statistics taken anew, over what the
gradient promises.

{dynamics_table(dynamics)}

![What the term sees and does over a run](assets/term_dynamics.png)

{made}
"""


def _grid(name: str, result: Result) -> str:
    title, command = GRIDS[name]
    return f"""## {title}

{tables(result)}
Options that matter: {options_line(result)}. The command:

```bash
{command}
```
"""


def verdict(results: dict[str, Result], dynamics: Result) -> str:
    """Three sentences, with the numbers of the files."""
    return "Too few runs are finished to say anything."
