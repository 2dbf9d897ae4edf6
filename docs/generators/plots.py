"""Draws the benchmark results, losing and refused rows included.

    python docs/generators/plots.py                       # benchmarks/results/*.json -> docs/assets/*.png
    python docs/generators/plots.py --results DIR --output DIR

A result that is not there is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from help_plots import curves, term_dynamics, verdict

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]

OURS, THEIRS, PLAIN = "#1b6ca8", "#c8803c", "#8a8a8a"


def color(variant: str) -> str:
    """Blue is this library's fast engine, orange what it stands beside, grey the step without the term."""
    if variant.startswith("without"):
        return PLAIN
    theirs = ("vmap", "loop", "BackPACK", "Opacus", "TorchJD", "gradconsist, vmap", "gradconsist, loop")
    return THEIRS if variant.startswith(theirs) else OURS


def measure_peers(result: Row, plt: Any) -> Any:
    """Time of every library, one panel a model and number of pairs."""
    rows = [{**row, "panel": f"{row['model']}, {row['pairs']} pairs"} for row in result["rows"]]
    title = "Monitoring: cosines of all pairs, without a graph; median and range of the time over this library's"
    return _bars(rows, "panel", "variant", "ratio", "times gc.measure", title, plt)


def _bars(rows: Sequence[Row], panel: str, label: str, value: str, axis: str, title: str, plt: Any) -> Any:
    panels = list(dict.fromkeys(row[panel] for row in rows))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    most = max(sum(row[panel] == name for row in rows) for name in panels)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.8 * columns, lines * (0.24 * most + 0.9)), squeeze=False, layout="constrained"
    )
    for ax, name in zip(axes.flat, panels, strict=False):
        mine = [row for row in rows if row[panel] == name]
        for y, row in enumerate(mine):
            if row["reason"] is not None:
                ax.text(0, y, " refused: " + _short(row["reason"]), va="center", fontsize=7, color=THEIRS)
                continue
            middle = row[f"{value}_median"]
            spread = [[middle - row[f"{value}_min"]], [row[f"{value}_max"] - middle]]
            ax.barh(y, middle, color=color(row[label]), xerr=spread, error_kw={"elinewidth": 1, "capsize": 2})
            ax.text(row[f"{value}_max"], y, f"  {middle:.2f}", va="center", fontsize=7)
        ax.set_yticks(range(len(mine)), [row[label] for row in mine], fontsize=7)
        ax.set_ylim(len(mine) - 0.4, -0.6)
        ax.margins(x=0.15)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel(axis, fontsize=8)
        _plain(ax)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_axis_off()
    figure.suptitle(title, fontsize=10)
    return figure


def _short(reason: str) -> str:
    reason = reason.split(": ", 1)[-1]
    return reason if len(reason) <= 60 else reason[:57] + "..."


def scaling(result: Row, plt: Any) -> Any:
    """Seconds above, peak below; a column an axis."""
    axes_names = list(dict.fromkeys(row["axis"] for row in result["rows"]))
    figure, axes = plt.subplots(2, len(axes_names), figsize=(4.2 * len(axes_names), 6.4), layout="constrained")
    for column, axis in enumerate(axes_names):
        mine = [row for row in result["rows"] if row["axis"] == axis]
        _lines(axes[0][column], mine, "value", "seconds_median", "seconds a step", axis.replace("_", " "))
        _lines(axes[1][column], mine, "value", "peak_mb", "peak memory, MiB", "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside upper center", ncols=len(labels))
    return figure


def _lines(ax: Any, rows: Sequence[Row], x: str, y: str, label: str, title: str) -> None:
    """One line a variant, logarithmic; a variant that was refused everywhere is named in the legend."""
    from matplotlib.ticker import LogLocator

    styles = ["-", "--", ":", "-."]
    seen: dict[str, int] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        points = [(row[x], row[y]) for row in rows if row["variant"] == variant and row["reason"] is None]
        kind = color(variant)
        style = styles[seen.get(kind, 0) % len(styles)]
        marker = "os^vD"[seen.get(kind, 0) % 5]
        seen[kind] = seen.get(kind, 0) + 1
        name = variant if points else f"{variant} (refused)"
        ax.plot(*(zip(*points, strict=True) if points else ([], [])), style, color=kind, marker=marker, label=name)
    values = sorted({row[x] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(values, [str(value) for value in values], fontsize=8)
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_yticks([], minor=True)
    ax.tick_params(axis="y", labelsize=8)
    ax.set_ylabel(label, fontsize=8)
    ax.set_title(title, fontsize=9)
    _plain(ax)


def frontier(result: Row, plt: Any) -> Any:
    """What is lost against time and against memory, and the Kronecker kind's error against its rank; a line a model."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    figure, axes = plt.subplots(
        len(models), 3, figsize=(13, 4.2 * len(models)), squeeze=False, layout="constrained",
        gridspec_kw={"width_ratios": [1.3, 1.3, 1]},
    )  # fmt: skip
    for line, model in zip(axes, models, strict=True):
        rows = [row for row in result["rows"] if row["model"] == model and row.get("angle_of_mean") is not None]
        for ax, cost, what in zip(line, ("ratio_median", "peak_ratio"), ("step", "peak"), strict=False):
            ax.set_title(f"{model}: gradient against {'time' if what == 'step' else 'memory'}", fontsize=9)
            shown = [row for row in rows if row.get(cost) is not None]
            if not shown:
                ax.text(0.5, 0.5, "not measured", ha="center", fontsize=8, transform=ax.transAxes)
                ax.set_axis_off()
                continue
            for row in shown:
                tint = THEIRS if "k=" in row["variant"].removeprefix("every=") else OURS
                ax.plot(row[cost], row["angle_of_mean"], "o", color=tint)
                label = row["variant"].removeprefix("encoder: ").replace(" of all", "")
                if ", every=" in label:
                    continue  # between the two that it is made of: in the table
                ax.annotate(label, (row[cost], row["angle_of_mean"]), (4, 3), textcoords="offset points", fontsize=7)
            ax.set_xlabel(f"times the {what} of FixMatch", fontsize=8)
            ax.set_ylabel("degrees off the exact gradient, mean of the batches", fontsize=8)
            ax.margins(x=0.2, y=0.1)
            _plain(ax)
        _ranks(line[2], [row for row in result["ranks"] if row["model"] == model])
    used = result["setting"]
    figure.suptitle(f"{used['labeled']} labeled + {used['pairs']} pairs, {used['rounds']} batches", fontsize=10)
    return figure


def _ranks(ax: Any, rows: Sequence[Row]) -> None:
    dims = [row["dim"] for row in rows]
    marks = {"norm_error": ("o-", THEIRS, "squared norm"), "norm_bound": (":", PLAIN, "its bound, from theory"),
             "cosine_error": ("s-", OURS, "cosine")}  # fmt: skip
    for key, (mark, tint, label) in marks.items():
        ax.plot(dims, [row[key] for row in rows], mark, color=tint, label=label, markersize=4)
    ax.plot(dims, [rows[0]["norm_error"] * (dims[0] / dim) ** 0.5 for dim in dims], "--", color=PLAIN, linewidth=0.8,
            label="1 / sqrt(k)")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(dims, [str(dim) for dim in dims], fontsize=8)
    ax.set_xlabel("k, kronecker", fontsize=8)
    ax.set_ylabel("rms error", fontsize=8)
    ax.set_title("error against rank", fontsize=9)
    ax.legend(fontsize=7, frameon=False)
    _plain(ax)


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(axis="x", labelsize=8)


PLOTS: dict[str, Callable[[Row, Any], Any]] = {
    "measure_peers": measure_peers,
    "scaling": scaling,
    "frontier": frontier,
    "help_four": curves,
    "term_dynamics": term_dynamics,
    "term_dynamics_group_norm": term_dynamics,
    "term_dynamics_through": term_dynamics,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "assets")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    options.output.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        path = options.results / f"{name}.json"
        if not path.is_file():
            print(f"{name}: no result")
            continue
        figure = draw(json.loads(path.read_text(encoding="utf-8")), plt)
        figure.savefig(options.output / f"{name}.png", dpi=110)
        plt.close(figure)
        print(f"{name}: {name}.png")
    figure = verdict(plt)
    figure.savefig(options.output / "help_verdict.png", dpi=110)
    print("help_verdict: help_verdict.png")


if __name__ == "__main__":
    main()
