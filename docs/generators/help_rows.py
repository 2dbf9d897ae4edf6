"""The rows of docs/does-it-help.md and docs/appendix/runs.md: from grids of training runs, and from searches.

A grid is a file `help_*.json` with runs, as `examples/reproduce.py` writes it; a search is a file of
benchmarks/evidence/search_settings.py (SEARCHES). A row of the verdict has at least `ENOUGH` paired seeds.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from shared import RESULTS, result_of

from trainer.claims import CLAIMS
from trainer.statistics import Difference, difference_text, paired_difference, spread, spread_text

Result = dict[str, Any]
Ends = dict[str, dict[int, float]]

ENOUGH = 5
# Title, command (options behind the -- are the trainer's), and what the title does not say, of the grids known so far.
GRIDS = {
    "help_four": (
        "Four classes, BatchNorm",
        "python examples/reproduce.py --budget photos\n"
        "python examples/reproduce.py --budget photos --table time --seeds 20",
        "",
    ),
    "help_group_norm": (
        "Four classes, GroupNorm",
        "python examples/reproduce.py --table main lambda remedies --budget photos --seeds 14 --output runs/group-norm"
        " -- --arch wrn-10-1-gn",
        "",
    ),
    "help_through_statistics": (
        "Four classes, through BatchNorm's statistics",
        "python examples/reproduce.py --table main lambda remedies --budget photos --output runs/through-statistics"
        " -- --ggcr-through-statistics",
        "The term's gradient is taken [through the"
        " statistics](../guides/batchnorm-and-dropout.md#through-the-statistics).",
    ),
    "help_ten": (
        "Ten classes, 250 labels",
        "python examples/reproduce.py --table main time --budget photos --output runs/ten-classes -- --labels 250"
        " --data-dir cifar10-jpeg --steps 4000 --threshold 0.8 --ggcr-warmup 400 --eval-every 400",
        "Chosen on held-out training images, where FixMatch was at .406 and the labels alone at .394 (one seed).",
    ),
}
# Searches to their titles, and what each trained on.
SEARCHES = {
    "digits_claim": ("Digits, 40 labels", "digits"),
    "digits_search": ("Digits, the best of a search", "digits"),
    "photographs_search": ("Photographs of two classes, the best of a search", "photographs"),
}
# Rows without the term.
PLAIN_METHODS = ("supervised", "fixmatch", "flexmatch", "fixmatch-longer")


def names() -> dict[str, str]:
    """Variant of the grid to what the tables call it, in their order."""
    found = {"supervised": "labels alone", "fixmatch": "FixMatch", "flexmatch": "FlexMatch",
             "fixmatch-longer": "FixMatch, equal time", "ggcr": "FixMatch + term, λ = 0.1"}  # fmt: skip
    for table, claim in CLAIMS.items():
        for row, variant in claim.rows.items():
            found.setdefault(variant, f"λ = {row}" if table == "lambda" else row.replace("lambda", "λ ="))
    return found


def grids() -> dict[str, Result]:
    """Every grid there is, by the name of its file: those known first."""
    found = {path.stem: result_of(path.stem) for path in sorted(RESULTS.glob("help_*.json"))}
    order = [*(name for name in GRIDS if name in found), *(name for name in found if name not in GRIDS)]
    return {name: found[name] for name in order if "runs" in found[name]}


def title(name: str) -> str:
    """What the pages call a grid."""
    return GRIDS[name][0] if name in GRIDS else name.removeprefix("help_").replace("_", " ").capitalize()


def ends(grid: Result) -> Ends:
    """Variant, seed to the averaged model's last accuracy in per cent."""
    found: Ends = {}
    for run in grid["runs"]:
        found.setdefault(run["variant"], {})[run["seed"]] = run["accuracies"][-1]
    return found


def fresh(result: Result) -> Ends:
    """The same by BatchNorm's statistics taken from training images at the end.

    Args:
        result: Of benchmarks/evidence/reestimate_statistics.py, on a grid's cells.

    Returns:
        By variant, then by seed.
    """
    found: Ends = {}
    for row in result["rows"]:
        variant, seed = re.fullmatch(r"\w+-\d+-(.+)-seed(\d+)", row["run"]).groups()  # type: ignore[union-attr]
        if row["weights"] == "averaged":
            found.setdefault(variant, {})[int(seed)] = 100 * row["anew"]
    return found


def against_fixmatch(values: Ends, variant: str) -> Difference | None:
    """Paired difference to FixMatch in points."""
    return paired_difference(values.get(variant, {}), values.get("fixmatch", {}))


def difference(values: Ends, variant: str) -> str:
    """As text: `+0.3 [-1.2, +1.8] (5)`."""
    found = against_fixmatch(values, variant)
    return difference_text(dataclasses.asdict(found) if found else None)


def mean(values: dict[int, float]) -> str:
    """Mean accuracy, deviation and number of seeds: `57.1 ± 1.2 (5)`."""
    return spread_text(dataclasses.asdict(spread(list(values.values()))))


class Row(NamedTuple):
    """A row of the verdict.

    Attributes:
        of: data and network.
        name: the setting.
        term: whether it has the term.
        accuracies: by seed, in per cent.
        gap: difference to FixMatch; None for FixMatch itself.
        each: differences by seed.
    """

    of: str
    name: str
    term: bool
    accuracies: dict[int, float]
    gap: Difference | None
    each: list[float]


def rows(values: Ends, least: int = 1) -> list[str]:
    """Variants of a grid with so many paired seeds, in the tables' order."""
    order = [*names(), *(variant for variant in values if variant not in names())]
    return [v for v in order if v in values and ((d := against_fixmatch(values, v)) is not None and d.n >= least)]


def searches() -> dict[str, Result]:
    """Results of benchmarks/evidence/search_settings.py with test images, by the names of their files."""
    found = {name: result_of(name) for name in SEARCHES if (RESULTS / f"{name}.json").exists()}
    return {name: result for name, result in found.items() if "confirm" in result["runs"]}


def verdict_rows(found: dict[str, Result], searched: dict[str, Result]) -> list[Row]:
    """Every setting with enough paired seeds, FixMatch with them, from grids and from searches."""
    result = []
    for name, grid in found.items():
        values = ends(grid)
        mine = rows(values, ENOUGH)
        for variant in mine if len(mine) > 1 else ():  # FixMatch alone has nothing to hold against it
            seeds = values[variant].keys() & values["fixmatch"].keys()
            each = [values[variant][seed] - values["fixmatch"][seed] for seed in sorted(seeds)]
            gap = None if variant == "fixmatch" else against_fixmatch(values, variant)
            term = variant not in PLAIN_METHODS
            result.append(Row(title(name), names().get(variant, variant), term, values[variant], gap, each))
    for name, search in searched.items():
        runs = {row: {int(s): 100 * run[0] for s, run in of.items()} for row, of in search["runs"]["confirm"].items()}
        for row in search["summary"]:
            if row["stage"] != "confirm" or row["n"] < ENOUGH:
                continue
            reference = runs[f"FixMatch, {row['base'].rpartition(', ')[2]}"]  # with as many labels
            accuracies = runs[row["name"]]
            gap = None if reference is accuracies else paired_difference(accuracies, reference)
            each = [accuracies[seed] - reference[seed] for seed in sorted(accuracies.keys() & reference.keys())]
            result.append(Row(SEARCHES[name][0], row["name"], row["term"], accuracies, gap, each))
    return result
