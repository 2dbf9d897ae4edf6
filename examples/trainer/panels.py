"""What a report draws: groups of runs as curves with bands, still without a drawing library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainer.runs import Group, Run

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
