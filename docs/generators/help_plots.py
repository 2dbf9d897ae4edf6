"""Pictures of docs/does-it-help.md and docs/appendix/runs.md: differences to FixMatch, curves, what the term sees."""

from __future__ import annotations

import statistics
import sys
import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from help_rows import grids, names, searches, verdict_rows

Row = dict[str, Any]

OURS, THEIRS, PLAIN = "#1b6ca8", "#c8803c", "#8a8a8a"


def verdict(plt: Any) -> Any:
    """Paired differences to FixMatch with their intervals, a line per row of the verdict's table, below its heading."""
    rows = [row for row in verdict_rows(grids(), searches()) if row.gap]
    shown: list[Any] = []
    for _, group in groupby(rows, lambda row: row.of):
        shown += [None, *group]
    figure, ax = plt.subplots(figsize=(8, 0.34 * len(shown) + 1.1), layout="constrained")
    labels = []
    for y, row in enumerate(shown):
        if row is None:
            labels.append(shown[y + 1].of)
            continue
        labels.append(textwrap.fill(f"{row.name} ({row.gap.n})", 44))
        tint = OURS if row.term else PLAIN
        ax.plot(row.each, [y] * len(row.each), ".", color=tint, alpha=0.3, markersize=4)
        ax.plot(row.gap.mean, y, "o", color=tint, markersize=6)
        ax.plot([row.gap.low, row.gap.high], [y, y], "-", color=tint, linewidth=1.5)
    ax.axvline(0, color="#333333", linewidth=0.8)
    ax.set_yticks(range(len(shown)), labels, fontsize=8)
    for label, row in zip(ax.get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if row is None else "normal")
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlabel("points over FixMatch, paired by seed (seeds); line: 95 % interval", fontsize=8)
    _plain(ax)
    return figure


def curves(result: Row, plt: Any) -> Any:
    """Test accuracy against the step: every seed, and the mean of each method."""
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for variant, tint in (("fixmatch", PLAIN), ("flexmatch", THEIRS), ("ggcr", OURS)):
        runs = [run for run in result["runs"] if run["variant"] == variant]
        for run in runs:
            ax.plot(run["steps"], run["accuracies"], "-", color=tint, alpha=0.25, linewidth=0.8)
        if runs:
            middle = [statistics.mean(values) for values in zip(*(run["accuracies"] for run in runs), strict=True)]
            ax.plot(runs[0]["steps"], middle, "-", color=tint, linewidth=2, label=f"{names()[variant]} ({len(runs)})")
    ax.set_xlabel("step", fontsize=8)
    ax.set_ylabel("test accuracy, per cent", fontsize=8)
    ax.legend(fontsize=8, frameon=False)
    _plain(ax)
    return figure


def term_dynamics(result: Row, plt: Any) -> Any:
    """Five quantities against the step, a line a run."""
    panels = {
        "cosine_all": "GC, mean over every pair",
        "strong_all": "norm of the pairs' gradients:\nstrong (line), weak (dashes)",
        "ratio": "||grad L_g|| / ||grad (L_s + mu L_u)||",
        "against_u": "cosine of grad L_g and grad L_u",
        "step_gain": "gain of a step / what the gradient promises",
    }
    runs = {
        variant: [row for row in result["rows"] if row["variant"] == variant]
        for variant in dict.fromkeys(row["variant"] for row in result["rows"])
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(18, 3.6), layout="constrained")
    for ax, (name, title) in zip(axes, panels.items(), strict=True):
        for (variant, rows), tint in zip(runs.items(), (PLAIN, OURS, THEIRS, "#2c9c69"), strict=False):
            ax.plot([row["step"] for row in rows], [row[name] for row in rows], "-", color=tint, label=variant)
            if name == "strong_all":
                ax.plot([row["step"] for row in rows], [row["weak_all"] for row in rows], "--", color=tint)
        if name in ("strong_all", "ratio"):
            ax.set_yscale("log")
        if name in ("against_u", "step_gain"):
            ax.axhline(0, color="#333333", linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("step", fontsize=8)
        _plain(ax)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
