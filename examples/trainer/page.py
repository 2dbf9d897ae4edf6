"""The report as one HTML page: no script, nothing from elsewhere, light and dark, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape

from trainer.evaluation import PROTOCOL
from trainer.panels import Panel, Series, panels
from trainer.runlog import duration, shown
from trainer.runs import Group, Run, differences
from trainer.statistics import CONFIDENCE, difference_text, paired_difference, spread, spread_text

KINDS = {"last": "last", "median_last_20": "median of last 20", "best": "best"}
# Options that say nothing about what was compared.
UNTOLD = {"output", "seed", "progress", "resume", "tensorboard", "stop_after_steps", "stop_after_minutes"}

STYLE = """
:root { color-scheme: light dark; --text: #1a1c20; --soft: #5b6068; --paper: #fff; --rule: #d9dce1;
  --c0: #0065a8; --c1: #c2410c; --c2: #15803d; --c3: #a21caf; --c4: #92700c; --c5: #0f766e; --c6: #b91c4b;
  --c7: #525b6b; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a2a8b1; --paper: #15171a; --rule: #373b42;
  --c0: #5cb3f5; --c1: #fb923c; --c2: #5fd185; --c3: #e583f2; --c4: #e0b83e; --c5: #4fd1c1; --c6: #fb7a9e;
  --c7: #b4bcc9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 0 0 0.25rem; } p { margin: 0.25rem 0 0.75rem; max-width: 70ch; }
h1, h2, td, li, p { overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); font-size: 0.85rem; line-height: 1.4; }
.panels { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; min-width: 0; } svg { display: block; width: 100%; height: auto; }
svg text { font: 13px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--rule); fill: none; } .line { fill: none; stroke: var(--c); stroke-width: 2;
  stroke-linejoin: round; } .band { fill: var(--c); opacity: 0.18; } .dot { fill: var(--c); }
.dashed { stroke-dasharray: 6 3; } .band.dashed { stroke-dasharray: none; opacity: 0.1; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0.5rem 0 1rem; padding: 0; }
.legend li { display: flex; align-items: center; gap: 0.5rem; } .legend svg { width: 28px; flex: none; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; } td { min-width: 4.5rem; } summary { cursor: pointer; font-weight: 600; margin: 1rem 0 0.5rem; }
""" + "".join(f".c{index} {{ --c: var(--c{index}); }}\n" for index in range(8))


def page(groups: Sequence[Group], *, title: str) -> str:
    """The HTML document with this heading; groups after the first are compared with the first."""
    runs = [run for group in groups for run in group.runs]
    unfinished = sum(run.summary is None for run in runs)
    words = f"{len(runs)} runs in {len(groups)} groups; runs that differ in their seed alone are one group."
    if unfinished:
        words += f" {unfinished} unfinished: curves show them, tables of groups do not count them."
    figures = [
        f"<figure><h3>{escape(panel.title)}</h3>{svg(panel)}<figcaption>{escape(panel.words)}</figcaption></figure>"
        for panel in panels(groups)
    ]
    how_to_read = (
        f"{PROTOCOL[0].upper()}{PROTOCOL[1:]}. Mean ± standard deviation (finished runs). "
        "Seconds per step are of training, waiting for images included, evaluations not."
    )
    names = [group.name for group in groups]
    different = [[name, *texts] for name, texts in differences([group.runs[0] for group in groups]).items()]
    body = [
        f"<h1>{escape(title)}</h1>", _soft(words), legend(names), f'<div class="panels">{"".join(figures)}</div>',
        "<h2>Accuracy and cost</h2>", _soft(how_to_read), _table(_group_rows(groups)),
        *_against_first(groups),
        "<h2>What differs</h2>",
        _table([["option", *names], *different]) if different else "<p>All groups have the same options.</p>",
        *_environments(runs),
        "<h2>Runs</h2>", _table(_run_rows(groups)),
        "<details><summary>All options</summary>", _table(_option_rows(groups)), "</details>",
    ]  # fmt: skip
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _soft(words: str) -> str:
    return f'<p class="soft">{escape(words)}</p>'


def _group_rows(groups: Sequence[Group]) -> list[list[str]]:
    rows = [["group", "seeds", *KINDS.values(), "seconds per step", "images per second", "training"]]
    for group in groups:
        accuracies = [run.accuracy() for run in group.finished]
        steps = [run.timing[-1][1] / run.timing[-1][0] for run in group.runs if run.timing and run.timing[-1][0]]
        rates = [run.rate for run in group.runs if run.rate is not None]
        seconds = [run.summary["seconds"] for run in group.finished if run.summary and "seconds" in run.summary]
        seeds = ", ".join(str(run.seed) for run in group.finished) or "none finished"
        shares = (_spread([one[kind] for one in accuracies if kind in one], 4) for kind in KINDS)
        time = duration(spread(seconds).mean) if seconds else "-"
        rows.append([group.name, seeds, *shares, _spread(steps, 3), _spread(rates, 1), time])
    return rows


def _spread(values: Sequence[float], digits: int) -> str:
    return spread_text(asdict(spread(values)) if values else None, digits=digits)


def _against_first(groups: Sequence[Group]) -> Iterable[str]:
    """Every group against the first, seed by seed, where data and split are the same."""
    if len(groups) < 2:
        return
    first = groups[0]
    yield f"<h2>Differences from {escape(first.name)}</h2>"
    yield _soft(
        f"Accuracy minus that of {first.name} at the same seed, on the same labeled split: "
        f"mean [Student's {100 * CONFIDENCE:.0f} % interval] (pairs of finished runs)."
    )
    rows = [["group", *KINDS.values()]]
    for group in groups[1:]:
        splits = {run.seed: (run.data, run.split) for run in first.finished}
        paired = [run for run in group.finished if splits.get(run.seed) == (run.data, run.split)]
        found = [paired_difference(_by_seed(paired, kind), _by_seed(first.finished, kind)) for kind in KINDS]
        rows.append([group.name, *(difference_text(asdict(one), digits=4) if one else "no pair" for one in found)])
    yield _table(rows)


def _by_seed(runs: Iterable[Run], kind: str) -> dict[int, float]:
    return {run.seed: run.accuracy()[kind] for run in runs if kind in run.accuracy()}


def _option_rows(groups: Sequence[Group]) -> list[list[str]]:
    options = [{"label": group.runs[0].label, **group.runs[0].options} for group in groups]
    names = dict.fromkeys(name for one in options for name in one if name not in UNTOLD)
    rows = [[name, *(shown(one[name]) if name in one else "(absent)" for one in options)] for name in names]
    return [["option", *(group.name for group in groups)], *rows]


def _environments(runs: Sequence[Run]) -> Iterable[str]:
    """Where the runs were started: one line if it was one place, else who was where."""
    places: dict[str, list[str]] = {}
    for run in runs:
        made = ", ".join(f"{name} {shown(value)}" for name, value in run.environment.items()) or "unknown"
        places.setdefault(made, []).append(run.folder.name)
    if len(places) == 1:
        yield _soft(f"All runs were started with {next(iter(places))}.")
        return
    yield _soft("The runs were not all started in one environment:")
    yield _table([["environment", "runs"], *([made, ", ".join(own)] for made, own in places.items())])


def _run_rows(groups: Sequence[Group]) -> list[list[str]]:
    rows = [["run", "data", "group", "seed", "step", *KINDS.values(), "state"]]
    for group in groups:
        for run in group.runs:
            numbers, steps = run.accuracy(), f"{run.step}/{shown(run.options.get('steps'))}"
            cells = (f"{numbers[kind]:.4f}" if kind in numbers else "-" for kind in KINDS)
            state = "unfinished" if run.summary is None else "finished"
            rows.append([str(run.folder), run.source, group.name, str(run.seed), steps, *cells, state])
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


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
