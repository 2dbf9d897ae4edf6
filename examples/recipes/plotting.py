"""Test-accuracy curves of one or several runs, and the table beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.errors import DatasetError
from recipes.files import read_json, write_atomically
from recipes.runlog import duration


@dataclass(frozen=True)
class Run:
    """What a run directory says about itself.

    Attributes:
        folder: The run directory.
        label: What was trained, for legends.
        options: Its options.
        steps: Steps of each evaluation.
        accuracies: Test accuracy of each evaluation.
        summary: `summary.json`, or None while the run is unfinished.
    """

    folder: Path
    label: str
    options: dict[str, Any]
    steps: list[int]
    accuracies: list[float]
    summary: dict[str, Any] | None


def read_run(folder: Path) -> Run:
    """Read a run directory, finished or not.

    Args:
        folder: The run directory.

    Returns:
        The run.

    Raises:
        DatasetError: Where it is not a run directory.
    """
    try:
        config = read_json(folder / "config.json")
        label, options = str(config["label"]), dict(config["options"])
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{folder} is not the directory of a run ({error}): give the --output of a trainer."
        ) from error
    evaluations = [record for record in records if record["kind"] == "eval"]
    return Run(
        folder,
        label,
        options,
        [record["step"] for record in evaluations],
        [record["test_accuracy"] for record in evaluations],
        summary,
    )


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
