"""Pictures of runs by matplotlib, and the table of runs for a terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from trainer.files import write_atomically
from trainer.panels import Panel, accuracy_panel
from trainer.runlog import aligned, duration
from trainer.runs import Run, group_runs
from trainer.statistics import FINAL


def draw_curves(runs: list[Run], path: Path, *, title: str | None = None) -> None:
    """Draw accuracy against the step as a PNG: a line for each group of runs, in a band over its seeds."""
    draw_panel(accuracy_panel(group_runs(runs)), path, title=title or shared_title(runs))


def draw_panel(panel: Panel, path: Path, *, title: str | None = None) -> None:
    """Draw a panel of the report as a PNG."""
    # The object interface, not pyplot: no global state, no window, no backend to choose.
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes: Any = figure.add_subplot(xlabel="step", ylabel=panel.title if title else "")
    axes.set_title((title or panel.title).replace("$", r"\$"), fontsize="medium")  # no formula
    axes.grid(alpha=0.3)
    for series in panel.series:
        mark = "." if len(series.steps) < 30 else None
        axes.plot(series.steps, series.middle, color=f"C{series.colour}", label=series.name, linewidth=1.4, marker=mark)
        if series.band is not None:
            axes.fill_between(series.steps, *series.band, color=f"C{series.colour}", alpha=0.18, linewidth=0)
    if panel.floor is not None:
        axes.set_ylim(bottom=panel.floor)
    if panel.series:
        for text in axes.legend().get_texts():
            text.set_parse_math(False)
    figure.text(0.01, 0.005, "\n".join(textwrap.wrap(panel.words, 110)), fontsize="x-small", color="0.35")
    figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94))
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def shared_title(runs: list[Run]) -> str:
    """Data, labels and architecture, as far as all runs share them."""
    parts = [{run.source for run in runs}]
    for key, form in (("labels", "{} labels"), ("arch", "{}"), ("batch_size", "batch {}")):
        parts.append({form.format(run.options[key]) for run in runs if run.options.get(key) is not None})
    return ", ".join(part.pop() for part in parts if len(part) == 1)


def table(runs: list[Run]) -> str:
    """A line for each run: its folder, what tells it from the others, data, seed, steps, accuracies and time."""
    names = {run.folder: group.name for group in group_runs(runs) for run in group.runs}
    rows: list[tuple[str, ...]] = [("run", "what", "data", "seed", "steps", "last", "median of 20", "best", "time")]
    for run in runs:
        numbers = run.summary or {}
        accuracies = (f"{numbers[key]:.4f}" if numbers.get(key) is not None else "-" for key in FINAL)
        time = duration(numbers["seconds"]) if "seconds" in numbers else "unfinished"
        steps = f"{run.step}/{run.options.get('steps')}"
        rows.append((str(run.folder), names[run.folder], run.source, str(run.seed), steps, *accuracies, time))
    return "\n".join(aligned(rows))
