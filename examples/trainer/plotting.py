"""Test-accuracy curves of one or several runs, and the table beside them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from trainer.files import write_atomically
from trainer.panels import Panel
from trainer.runlog import aligned, duration
from trainer.runs import Run, group_runs


def draw_curves(runs: list[Run], path: Path, *, title: str | None = None) -> None:
    """Draw test accuracy against the step, one colour per group, one line per run.

    Args:
        runs: The runs.
        path: The PNG to write.
        title: Title of the picture; None for the options that the runs share.
    """
    figure, axes = _axes(title or shared_title(runs), "test accuracy (EMA model)")
    for number, group in enumerate(group_runs(runs)):
        for run in group.runs:
            axes.plot(
                run.steps,
                run.accuracies,
                color=f"C{number}",
                label=group.name if run is group.runs[0] else None,
                linewidth=1.4,
                marker="." if len(run.steps) < 30 else None,
            )
    _save(figure, axes, path)


def draw_panel(panel: Panel, path: Path) -> None:
    """Draw a panel of the report: lines with bands.

    Args:
        panel: What to draw.
        path: The PNG to write.
    """
    figure, axes = _axes(panel.title, "")
    for series in panel.series:
        axes.plot(series.steps, series.middle, color=f"C{series.colour}", label=series.name, linewidth=1.4)
        if series.band is not None:
            axes.fill_between(series.steps, *series.band, color=f"C{series.colour}", alpha=0.18, linewidth=0)
    if panel.floor is not None:
        axes.set_ylim(bottom=panel.floor)
    figure.text(0.01, 0.005, "\n".join(textwrap.wrap(panel.words, 110)), fontsize="x-small", color="0.35")
    figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94))
    _save(figure, axes, path)


def _axes(title: str, height: str) -> tuple[Any, Any]:
    # The object interface, not pyplot: no global state, no window, no backend to choose.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.set_ylabel(height)
    axes.set_title(_plain(title), fontsize="medium")
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    legend = axes.legend()
    for text in legend.get_texts():
        text.set_parse_math(False)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def shared_title(runs: list[Run]) -> str:
    """Data, labels and architecture, as far as all runs share them."""
    parts = []
    for key, form in (("dataset", "{}"), ("labels", "{} labels"), ("arch", "{}"), ("batch_size", "batch {}")):
        values = {str(run.options.get(key)) for run in runs}
        if len(values) == 1:
            parts.append(form.format(values.pop()))
    return ", ".join(parts)


def table(runs: list[Run]) -> str:
    """A text table of the runs.

    Args:
        runs: The runs.

    Returns:
        One line per run: method, seed, steps, accuracies and time.
    """
    rows: list[tuple[str, ...]] = [("method", "seed", "steps", "last", "median of 20", "best", "time")]
    for run in runs:
        numbers = run.summary or {}
        rows.append(
            (
                run.label,
                str(run.options.get("seed")),
                f"{run.steps[-1] if run.steps else 0}/{run.options.get('steps')}",
                *(f"{numbers[key]:.4f}" if key in numbers else "-" for key in ("last", "median_last_20", "best")),
                duration(numbers["seconds"]) if "seconds" in numbers else "unfinished",
            )
        )
    return "\n".join(aligned(rows))
