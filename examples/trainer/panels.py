"""What a report draws: groups of runs as curves with bands, as PNGs by matplotlib; and the table for a terminal."""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.files import write_atomically
from trainer.runlog import aligned, duration
from trainer.runs import Group, Run, group_runs
from trainer.statistics import FINAL

# More points than a screen has room for make a page slow, and a curve no clearer.
MOST_POINTS = 240


@dataclass(frozen=True)
class Series:
    """The curve of one group."""

    name: str  # The group's.
    colour: int  # Number of its colour, the same in every panel.
    steps: list[int]  # Where it has points.
    middle: list[float]  # Its height there.
    band: tuple[list[float], list[float]] | None  # Lower and upper edge there; None without a band.


@dataclass(frozen=True)
class Panel:
    """One picture."""

    key: str  # For file names.
    title: str  # What it shows.
    words: str  # How to read line and band.
    series: tuple[Series, ...]  # The curves; those of groups without such numbers are left out.
    floor: float | None = None  # Where the axis of heights begins; None for what the curves need.


Curve = Callable[[Run], Mapping[int, float]]

_SEEDS = "Line: mean over seeds. Band: from the lowest to the highest seed."
_ONE_SEED = "One seed each."


def panels(groups: Sequence[Group]) -> list[Panel]:
    """All pictures for which there are numbers."""
    drawn = [
        accuracy_panel(groups),
        Panel(
            "gc", "GC: cosine between the views' gradients",
            "Line: median pair. Band: from the 10 % to the 90 % quantile of the pairs compared since the last point, "
            "averaged over seeds. A run whose log has no quantiles shows its mean as a line alone.",
            tuple(series for number, group in enumerate(groups) if (series := _spread_of_pairs(group, number))),
        ),
        _panel("degenerate", "Degenerate pairs, share of those compared", groups, _degenerate),
        _panel("mask", "Mask rate: share of pseudo-labels that count", groups, _logged("mask_rate")),
        _panel("confident", "Right pseudo-labels, of those that count", groups, _logged("confident_accuracy")),
        _panel("pseudo", "Right pseudo-labels, of all", groups, _logged("pseudo_label_accuracy")),
        _panel("seconds", "Seconds per step, without evaluations", groups, _seconds),
    ]  # fmt: skip
    return [panel for panel in drawn if panel.series]


def accuracy_panel(groups: Sequence[Group]) -> Panel:
    """Test accuracy over the steps."""
    return _panel("accuracy", "Test accuracy of the averaged model", groups, _accuracy, floor=None)


def _panel(key: str, title: str, groups: Sequence[Group], curve: Curve, *, floor: float | None = 0.0) -> Panel:
    drawn = (_over_seeds(group, number, curve) for number, group in enumerate(groups))
    series = tuple(one for one in drawn if one.steps)
    return Panel(key, title, _SEEDS if any(one.band for one in series) else _ONE_SEED, series, floor)


def _over_seeds(group: Group, colour: int, curve: Curve) -> Series:
    curves = [curve(run) for run in group.runs]
    steps = thinned(sorted(set().union(*curves)))
    values = [[one[step] for one in curves if step in one] for step in steps]
    band = ([min(v) for v in values], [max(v) for v in values]) if len(curves) > 1 else None
    return Series(group.name, colour, steps, [sum(v) / len(v) for v in values], band)


def _spread_of_pairs(group: Group, colour: int) -> Series | None:
    low, middle, high = (
        _over_seeds(group, colour, _logged(name)) for name in ("ggcr_cosine_q10", "ggcr_cosine_q50", "ggcr_cosine_q90")
    )
    if middle.steps:
        return Series(group.name, colour, middle.steps, middle.middle, (low.middle, high.middle))
    mean = _over_seeds(group, colour, _logged("ggcr_cosine"))
    return Series(group.name, colour, mean.steps, mean.middle, None) if mean.steps else None


def thinned(steps: list[int], most: int = MOST_POINTS) -> list[int]:
    """At most so many of the steps, evenly spread, the last among them."""
    stride = -(-len(steps) // most) or 1
    return steps[::-1][::stride][::-1]


def _accuracy(run: Run) -> Mapping[int, float]:
    return dict(zip(run.steps, run.accuracies, strict=True))


def _logged(name: str) -> Curve:
    return lambda run: run.curve(name)


def _degenerate(run: Run) -> Mapping[int, float]:
    pairs, degenerate = run.curve("ggcr_pairs"), run.curve("ggcr_degenerate")
    return {step: degenerate[step] / pairs[step] for step in degenerate if pairs.get(step, 0) > 0}


def _seconds(run: Run) -> Mapping[int, float]:
    """Between the lines of timing.jsonl; the first counts from the start."""
    before = [(0, 0.0), *run.timing]
    return {
        step: (seconds - earlier) / (step - first)
        for (first, earlier), (step, seconds) in zip(before, run.timing, strict=False)
    }


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
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture. Letters that no font here has are boxes in it, which is said once, and not letter by letter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:].lower()))
    if any("missing from font" in str(warning.message) for warning in caught):
        print(f"note: {path} has boxes for letters that no font of this machine has", file=sys.stderr)


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
