"""The report as one HTML page: no script, nothing from elsewhere, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from trainer.evaluation import PROTOCOL
from trainer.panels import panels
from trainer.runlog import duration, shown
from trainer.runs import Group, Run
from trainer.statistics import CONFIDENCE, paired_difference, spread
from trainer.svg import legend, svg

KINDS = {"last": "last", "median_last_20": "median of last 20", "best": "best"}
# Options that say nothing about what was compared.
UNTOLD = {"output", "data_dir", "progress", "resume", "tensorboard", "stop_after_steps", "stop_after_minutes"}

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
    """Write the page.

    Args:
        groups: At least one group of runs; the others are compared with the first.
        title: Heading of the page.

    Returns:
        The HTML document.
    """
    runs = [run for group in groups for run in group.runs]
    open_runs = [run for run in runs if run.summary is None]
    words = f"{len(runs)} runs in {len(groups)} groups; runs that differ in their seed alone are one group."
    if open_runs:
        words += f" {len(open_runs)} unfinished: curves show them, tables of groups do not count them."
    figures = [
        f"<figure><h3>{escape(panel.title)}</h3>{svg(panel)}<figcaption>{escape(panel.words)}</figcaption></figure>"
        for panel in panels(groups)
    ]
    body = [
        f"<h1>{escape(title)}</h1>", f'<p class="soft">{words}</p>', legend([group.name for group in groups]),
        f'<div class="panels">{"".join(figures)}</div>',
        "<h2>Accuracy and cost</h2>", f'<p class="soft">{escape(_how_to_read())}</p>', _table(_group_rows(groups)),
        *_differences(groups),
        "<h2>What differs</h2>", *_options(groups), *_environments(runs),
        "<h2>Runs</h2>", _table(_run_rows(groups)),
        "<details><summary>All options</summary>", _table(_option_rows(groups, only_different=False)), "</details>",
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


def _how_to_read() -> str:
    return (
        f"{PROTOCOL[0].upper()}{PROTOCOL[1:]}. Mean ± standard deviation over the finished runs of a group. "
        "Seconds per step are of training, waiting for images included, evaluations not."
    )


def _group_rows(groups: Sequence[Group]) -> list[list[str]]:
    rows = [["group", "seeds", *KINDS.values(), "seconds per step", "images per second", "training"]]
    for group in groups:
        accuracies = [run.accuracy() for run in group.finished]
        steps = [run.timing[-1][1] / run.timing[-1][0] for run in group.runs if run.timing and run.timing[-1][0]]
        rates = [run.rate for run in group.runs if run.rate is not None]
        seconds = [run.summary["seconds"] for run in group.finished if run.summary and "seconds" in run.summary]
        seeds = ", ".join(str(run.seed) for run in group.finished) or "none finished"
        rows.append(
            [group.name, seeds, *(_spread([one[kind] for one in accuracies], 4) for kind in KINDS), _spread(steps, 3),
             _spread(rates, 1), duration(spread(seconds).mean) if seconds else "-"]
        )  # fmt: skip
    return rows


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    numbers = spread(values)
    deviation = "" if numbers.sd is None else f" ± {numbers.sd:.{digits}f}"
    return f"{numbers.mean:.{digits}f}{deviation}"


def _differences(groups: Sequence[Group]) -> Iterable[str]:
    """Every group against the first, seed by seed, where data and split are the same."""
    if len(groups) < 2:
        return
    first = groups[0]
    yield f"<h2>Differences from {escape(first.name)}</h2>"
    yield (
        f'<p class="soft">Accuracy minus that of {escape(first.name)} at the same seed, on the same labeled split: '
        f"mean [Student's {100 * CONFIDENCE:.0f} % interval] (pairs of finished runs).</p>"
    )
    rows = [["group", *KINDS.values()]]
    for group in groups[1:]:
        cells = []
        for kind in KINDS:
            splits = {run.seed: run.split for run in first.finished}
            paired = [run for run in group.finished if run.seed in splits and run.split == splits[run.seed]]
            found = paired_difference(
                {run.seed: run.accuracy()[kind] for run in paired},
                {run.seed: run.accuracy()[kind] for run in first.finished},
            )
            if found is None:
                cells.append("no pair")
            else:
                interval = "" if found.low is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
                cells.append(f"{found.mean:+.4f}{interval} ({found.n})")
        rows.append([group.name, *cells])
    yield _table(rows)


def _options(groups: Sequence[Group]) -> Iterable[str]:
    rows = _option_rows(groups, only_different=True)
    if len(rows) > 1:
        yield _table(rows)
    else:
        yield "<p>All groups have the same options.</p>"


def _option_rows(groups: Sequence[Group], *, only_different: bool) -> list[list[str]]:
    options = [{"label": group.runs[0].label, **group.runs[0].options} for group in groups]
    names = [name for name in dict.fromkeys(name for one in options for name in one) if name not in UNTOLD | {"seed"}]
    values = [[name, *(shown(one[name]) if name in one else "(absent)" for one in options)] for name in names]
    kept = [row for row in values if not only_different or len(set(row[1:])) > 1]
    return [["option", *(group.name for group in groups)], *kept]


def _environments(runs: Sequence[Run]) -> Iterable[str]:
    """Where the runs were started: one line if it was one place, else who was where."""
    places: dict[str, list[Run]] = {}
    for run in runs:
        made = ", ".join(f"{name} {shown(value)}" for name, value in run.environment.items()) or "unknown"
        places.setdefault(made, []).append(run)
    if len(places) == 1:
        yield f'<p class="soft">All runs were started with {escape(next(iter(places)))}.</p>'
        return
    yield '<p class="soft">The runs were not all started in one environment:</p>'
    yield _table(
        [["environment", "runs"], *([made, ", ".join(run.folder.name for run in own)] for made, own in places.items())]
    )


def _run_rows(groups: Sequence[Group]) -> list[list[str]]:
    rows = [["run", "group", "seed", "step", *KINDS.values(), "state"]]
    for group in groups:
        for run in group.runs:
            numbers = run.accuracy()
            state = "unfinished" if run.summary is None else "finished"
            rows.append(
                [str(run.folder), group.name, str(run.seed), f"{run.step}/{shown(run.options.get('steps'))}",
                 *(f"{numbers[kind]:.4f}" if kind in numbers else "-" for kind in KINDS), state]
            )  # fmt: skip
    return rows


def _table(rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
