"""Test-accuracy curves of one or several runs, and the table beside them."""

from __future__ import annotations

from pathlib import Path

from recipes.files import write_atomically
from recipes.runlog import duration
from recipes.runs import Run


def draw_curves(runs: list[Run], path: Path, *, title: str | None = None) -> None:
    """Draw test accuracy against the step, one colour per method, one line per run.

    Args:
        runs: The runs.
        path: The PNG to write.
        title: Title of the picture; None for the options that the runs share.
    """
    # The object interface, not pyplot: no global state, no window, no backend to choose.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    labels = sorted({run.label for run in runs})
    for run in runs:
        first = run is next(other for other in runs if other.label == run.label)
        axes.plot(
            run.steps,
            run.accuracies,
            color=f"C{labels.index(run.label)}",
            label=run.label if first else None,
            linewidth=1.4,
            marker="." if len(run.steps) < 30 else None,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("test accuracy (EMA model)")
    axes.set_title(title or shared_title(runs), fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
