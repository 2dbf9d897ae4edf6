"""The pictures of docs/does-it-help.md: differences to FixMatch, curves, and what the term sees over a run."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from recipes.claims import CLAIMS
from recipes.statistics import paired_difference

Row = dict[str, Any]

OURS, THEIRS, PLAIN = "#1b6ca8", "#c8803c", "#8a8a8a"


def does_it_help(result: Row, plt: Any) -> Any:
    """Left: paired differences to FixMatch, a line a variant. Right: the curves of the main table."""
    ends: dict[str, dict[int, float]] = {}
    for run in result["runs"]:
        ends.setdefault(run["variant"], {})[run["seed"]] = run["accuracies"][-1]
    names = _names(result)
    shown = [variant for variant in names if variant in ends and variant != "fixmatch"]
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(12, max(4.0, 0.3 * len(shown) + 1.2)),
        layout="constrained",
        gridspec_kw={"width_ratios": [1.2, 1]},
    )
    for y, variant in enumerate(shown):
        found = paired_difference(ends[variant], ends["fixmatch"])
        if found is None:
            continue
        tint = PLAIN if variant in ("supervised", "flexmatch", "fixmatch-longer") else OURS
        for seed, value in ends[variant].items():
            if seed in ends["fixmatch"]:
                left.plot(value - ends["fixmatch"][seed], y, ".", color=tint, alpha=0.35, markersize=5)
        left.plot(found.mean, y, "o", color=tint)
        if found.low is not None:
            left.plot([found.low, found.high], [y, y], "-", color=tint, linewidth=1.2)
    left.axvline(0, color="#333333", linewidth=0.8)
    counts = {variant: len(ends[variant].keys() & ends["fixmatch"].keys()) for variant in shown}
    left.set_yticks(range(len(shown)), [f"{names[variant]} ({counts[variant]})" for variant in shown], fontsize=8)
    left.set_ylim(len(shown) - 0.4, -0.6)
    left.set_xlabel("points over FixMatch, paired by seed; line: 95 % interval (seeds)", fontsize=8)
    left.set_xlim(*_limits([value for variant in shown for value in _all(ends, variant)]))
    for variant, tint in (("fixmatch", PLAIN), ("flexmatch", THEIRS), ("ggcr", OURS)):
        runs = [run for run in result["runs"] if run["variant"] == variant]
        for run in runs:
            right.plot(run["steps"], run["accuracies"], "-", color=tint, alpha=0.25, linewidth=0.8)
        if runs:
            middle = [statistics.mean(values) for values in zip(*(run["accuracies"] for run in runs), strict=True)]
            right.plot(runs[0]["steps"], middle, "-", color=tint, linewidth=2, label=names[variant])
    right.set_xlabel("step", fontsize=8)
    right.set_ylabel("test accuracy, per cent", fontsize=8)
    right.legend(fontsize=8, frameon=False)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="x", labelsize=8)
    return figure


def _all(ends: dict[str, dict[int, float]], variant: str) -> list[float]:
    return [value - ends["fixmatch"][seed] for seed, value in ends[variant].items() if seed in ends["fixmatch"]]


def _limits(values: list[float]) -> tuple[float, float]:
    """Of the axis: every seed, however wide the intervals of few seeds are."""
    low, high = min([*values, 0.0]), max([*values, 0.0])
    margin = 0.08 * (high - low) + 0.5
    return low - margin, high + margin


def _names(result: Row) -> dict[str, str]:
    """Variant to how the tables call it, in the tables' order."""
    names = {"fixmatch": "FixMatch", "ggcr": "GGCR", "flexmatch": "FlexMatch"}
    for table in result["tables"].values():
        prefix = "λ = " if table["label"] == CLAIMS["lambda"].label else ""
        for row in table["rows"]:
            names.setdefault(row["variant"], prefix + row["row"])
    return names


def term_dynamics(result: Row, plt: Any) -> Any:
    """Four quantities against the step, a line a run."""
    panels = {
        "cosine_all": "GC, mean over every pair",
        "strong_all": "norm of the pairs' gradients: strong (line), weak (dashes)",
        "ratio": "||grad L_g|| / ||grad (L_s + mu L_u)||",
        "against_u": "cosine of grad L_g and grad L_u",
    }
    runs = {
        variant: [row for row in result["rows"] if row["variant"] == variant]
        for variant in dict.fromkeys(row["variant"] for row in result["rows"])
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 3.6), layout="constrained")
    for ax, (name, title) in zip(axes, panels.items(), strict=True):
        for (variant, rows), tint in zip(runs.items(), (PLAIN, OURS, THEIRS, "#2c9c69"), strict=False):
            ax.plot([row["step"] for row in rows], [row[name] for row in rows], "-", color=tint, label=variant)
            if name == "strong_all":
                ax.plot([row["step"] for row in rows], [row["weak_all"] for row in rows], "--", color=tint)
        if name in ("strong_all", "ratio"):
            ax.set_yscale("log")
        if name == "against_u":
            ax.axhline(0, color="#333333", linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("step", fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    axes[0].legend(fontsize=8, frameon=False)
    return figure
