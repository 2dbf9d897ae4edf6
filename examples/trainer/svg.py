"""A panel as inline SVG: text a person can select, colours from the page's style sheet, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from trainer.panels import Panel, Series

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 10, 34
COLOURS = 8


def svg(panel: Panel) -> str:
    """Draw a panel."""
    heights = [value for series in panel.series for edge in (series.middle, *(series.band or ())) for value in edge]
    last = max(series.steps[-1] for series in panel.series)
    x_marks = [mark for mark in ticks(0, last) if mark <= last]
    # A share that is 0 throughout lies on the axis of a whole picture.
    lowest, highest = (min(heights), max(heights)) if panel.floor is None else (panel.floor, max(heights) or 1.0)
    y_marks = ticks(lowest, highest)
    low, high = y_marks[0], y_marks[-1]

    def place(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_summary(panel))}">']
    for mark in y_marks:
        x, y = place(0, mark).split(",")
        parts.append(f'<path class="grid" d="M{x},{y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="0.35em" text-anchor="end">{number(mark)}</text>')
    for mark in x_marks:
        x, y = place(mark, low).split(",")
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(mark)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">step</text>')
    for series in panel.series:
        if series.band is not None:
            there = [place(*point) for point in zip(series.steps, series.band[1], strict=True)]
            back = [place(*point) for point in zip(series.steps, series.band[0], strict=True)][::-1]
            parts.append(f'<path class="band {colour(series.colour)}" d="M{"L".join(there + back)}Z"/>')
    for series in panel.series:
        points = [place(*point) for point in zip(series.steps, series.middle, strict=True)]
        named = f"<title>{escape(_last(series))}</title>"
        parts.append(f'<path class="line {colour(series.colour)}" d="M{"L".join(points)}">{named}</path>')
        x, y = points[-1].split(",")
        parts.append(f'<circle class="dot {colour(series.colour)}" cx="{x}" cy="{y}" r="2.5">{named}</circle>')
    return "\n".join([*parts, "</svg>"])


def colour(index: int) -> str:
    """Classes of a group's colour."""
    return f"c{index % COLOURS}" + (" dashed" if index // COLOURS % 2 else "")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, 1, 2 or 5 times 10^k apart, from at most `low` to at least `high`; about `most` of them."""
    if high <= low:
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * power for size in (1, 2, 5, 10, 20) if (high - low) / (size * power) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def number(value: float) -> str:
    """A number for an axis: 20k, 1.5M, 0.25."""
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and letter == "M"):
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _last(series: Series) -> str:
    return f"{series.name}: {series.middle[-1]:.4g} at step {series.steps[-1]:,}"


def _summary(panel: Panel) -> str:
    return f"{panel.title}. " + "; ".join(_last(series) for series in panel.series)


def legend(names: Sequence[str]) -> str:
    """The groups with their colours, as an HTML list."""
    swatch = '<svg viewBox="0 0 28 10" aria-hidden="true"><path class="line {}" d="M1,5H27"/></svg>'
    items = [f"<li>{swatch.format(colour(index))}{escape(name)}</li>" for index, name in enumerate(names)]
    return '<ul class="legend">' + "".join(items) + "</ul>"
