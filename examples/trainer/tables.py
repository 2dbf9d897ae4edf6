"""The tables from the runs of a grid, the paper's beside its claims: as a record, as text and as Markdown."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from trainer.claims import CLAIMS, Claim
from trainer.grid import Grid, papers_protocol
from trainer.runlog import aligned, shown
from trainer.runs import Run, read_run
from trainer.statistics import CONFIDENCE, difference_text, paired_difference, signed, spread, spread_text

# Of a run's steps, at which the table of curves shows accuracies.
SHARES = (0.25, 0.5, 0.75, 1.0)

Runs = dict[tuple[str, str], dict[int, Run]]


def measure(grid: Grid, metric: str) -> dict[str, Any]:
    """Compute the grid's tables from its finished cells; accuracies are in per cent, differences in points."""
    runs: Runs = {}
    for cell in grid.cells:
        if cell.is_finished():
            runs.setdefault((cell.column, cell.variant), {})[cell.config.seed] = read_run(cell.folder)
    protocol = {column: _protocol(column, options) for column, options in grid.protocol().items()}
    environments = [run.environment for seeds in runs.values() for run in seeds.values()]
    tables = {}
    for name in grid.tables:
        claim = CLAIMS[name]
        rows = _curve_rows(claim, runs) if claim.text else list(_rows(claim, runs, metric))
        tables[name] = {
            "label": claim.label, "caption": claim.caption, "claim": claim.text, "note": claim.note,
            "reference": claim.reference, "rows": rows,
            "absent": {column: grid.absent[column] for column in claim.columns if column in grid.absent},
        }  # fmt: skip
    return {
        "format": 1,
        "budget": grid.budget,
        "metric": metric,
        "confidence": CONFIDENCE,
        "cells": len(grid.cells),
        "finished": sum(cell.is_finished() for cell in grid.cells),
        "runs": _records(runs),
        "protocol": protocol,
        "environments": [dict(items) for items in dict.fromkeys(tuple(e.items()) for e in environments)],
        "tables": tables,
    }


def _records(runs: Runs) -> list[dict[str, Any]]:
    """Every finished run: its place in the grid, its seconds of training, and its accuracies in per cent."""
    return [
        {
            "column": column,
            "variant": variant,
            "seed": seed,
            "seconds": (run.summary or {}).get("seconds"),
            "steps": run.steps,
            "accuracies": [round(100 * value, 4) for value in run.accuracies],
        }
        for (column, variant), seeds in runs.items()
        for seed, run in seeds.items()
    ]


def _protocol(column: str, options: dict[str, Any]) -> dict[str, Any]:
    paper = papers_protocol(column)
    return {
        "options": options,
        "differs": {name: [paper[name], value] for name, value in options.items() if value != paper[name]},
    }


def _rows(claim: Claim, runs: Runs, metric: str) -> Iterator[dict[str, Any]]:
    for column in claim.columns:
        reference = _values(runs, column, claim.rows[claim.reference], metric)
        for row, variant in claim.rows.items():
            claimed, values = claim.accuracy.get((row, column)), _values(runs, column, variant, metric)
            measured = _spread_of(values)
            own = row == claim.reference
            difference = None if own else paired_difference(values, reference)
            apart = None if claimed is None or own else round(claimed - claim.accuracy[claim.reference, column], 6)
            yield {
                "row": row, "column": column, "variant": variant, "claim": claimed, "by_seed": _keys(values),
                "measured": measured,
                "deviation": measured["mean"] - claimed if measured and claimed is not None else None,
                "difference": _record(difference),
                "claimed_difference": apart,
                "interval_holds_claim": difference.contains(apart) if difference and apart is not None else None,
            }  # fmt: skip


def _record(numbers: Any) -> dict[str, Any] | None:
    return dataclasses.asdict(numbers) if numbers else None


def _spread_of(by_seed: dict[int, float]) -> dict[str, Any] | None:
    return _record(spread(list(by_seed.values())) if by_seed else None)


def _values(runs: Runs, column: str, variant: str, metric: str) -> dict[int, float]:
    return {seed: 100 * run.accuracy()[metric] for seed, run in runs.get((column, variant), {}).items()}


def _curve_rows(claim: Claim, runs: Runs) -> list[dict[str, Any]]:
    """How high the curves are on the way, and when they first reach what all methods reach in the end."""
    column = claim.columns[0]
    curves = {row: runs.get((column, variant), {}) for row, variant in claim.rows.items()}
    seeds = set.intersection(*(set(by_seed) for by_seed in curves.values()))
    level = {seed: min(by_seed[seed].accuracies[-1] for by_seed in curves.values()) for seed in seeds}
    reached = {
        row: {seed: float(_reached(by_seed[seed], level[seed])) for seed in sorted(seeds)}
        for row, by_seed in curves.items()
    }
    height = {
        row: {seed: 100 * spread(run.accuracies).mean for seed, run in by_seed.items()}
        for row, by_seed in curves.items()
    }
    rows = []
    for row, by_seed in curves.items():
        own = row == claim.reference
        differences = {
            name: None if own else _record(paired_difference(values[row], values[claim.reference]))
            for name, values in (("difference", height), ("steps_difference", reached))
        }
        rows.append(
            {
                "row": row, "column": column, "variant": claim.rows[row],
                "at": [[share, _at(list(by_seed.values()), share)] for share in SHARES],
                "over_run": _spread_of(height[row]),
                "steps_to_level": _spread_of(reached[row]),
                "by_seed": {"over_run": _keys(height[row]), "steps_to_level": _keys(reached[row])},
                **differences,
            }
        )  # fmt: skip
    return rows


def _reached(run: Run, level: float) -> int:
    return next(step for step, value in zip(run.steps, run.accuracies, strict=True) if value >= level)


def _at(runs: list[Run], share: float) -> float | None:
    """Mean accuracy in per cent at the last evaluation up to a share of the steps; None where some run has none."""
    heights = [
        [value for step, value in zip(run.steps, run.accuracies, strict=True) if step <= share * run.steps[-1]]
        for run in runs
    ]
    return 100 * spread([before[-1] for before in heights]).mean if heights and all(heights) else None


def _keys(values: dict[int, float]) -> dict[str, float]:
    return {str(seed): value for seed, value in values.items()}


def text(result: dict[str, Any]) -> str:
    """The tables for a terminal."""
    parts = [_wrapped(_head(result))]
    for name, table in result["tables"].items():
        below = [_wrapped(line) for line in _below(table)]
        parts.append("\n".join([f"\n{name}: {_caption(table)}", "", *aligned(_cells(table)), *below]))
    return "\n".join(parts)


def _wrapped(lines: str) -> str:
    return "\n".join(textwrap.fill(line, 110, break_on_hyphens=False) for line in lines.split("\n"))


def markdown(result: dict[str, Any], *, level: int = 2) -> str:
    """The tables in Markdown."""
    parts = [_head(result)]
    for table in result["tables"].values():
        cells = _cells(table)
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        lines.insert(1, "| --- |" + " ---: |" * (len(cells[0]) - 1))
        parts.append("\n".join([f"\n{'#' * level} {_caption(table)}", "", *lines, *_below(table)]))
    return "\n".join(parts) + "\n"


def _head(result: dict[str, Any]) -> str:
    lines = [f"Budget {result['budget']}: {result['finished']} of {result['cells']} runs finished."]
    for column, protocol in result["protocol"].items():
        options, differs = protocol["options"], protocol["differs"]
        unlabeled = options["batch_size"] * options["unlabeled_ratio"]
        lines.append(
            f"\n{column}: {options['dataset']} with {options['labels']} labels, {options['arch']}, "
            f"{options['steps']:,} steps of {options['batch_size']} + {unlabeled} images."
        )
        if differs:
            changes = "; ".join(
                f"{name} {shown(here)} (paper: {shown(paper)})" for name, (paper, here) in differs.items()
            )
            lines.append(f"This is not the paper's protocol: {changes}.")
        else:
            lines.append("This is the paper's protocol, as far as the paper states it.")
    lines.append(
        f"\nAccuracy: {result['metric']} of the averaged model on the test images, in per cent, mean ± standard "
        f"deviation over seeds (n). Differences are paired by seed, in points, with Student's "
        f"{100 * result['confidence']:.0f} % interval. The paper's numbers are claims: no run behind them is known."
    )
    made = "; ".join(", ".join(f"{key} {shown(value)}" for key, value in e.items()) for e in result["environments"])
    return "\n".join([*lines, f"\nMade with {made}."] if made else lines)


def _caption(table: dict[str, Any]) -> str:
    source = f"the paper's {table['label']}" if table["label"] else "not in the paper"
    return f"{table['caption']} ({source})"


def _below(table: dict[str, Any]) -> list[str]:
    lines = [f"{column} is not run: {reason}." for column, reason in table["absent"].items()]
    lines += [f"The paper claims: “{table['claim']}”"] if table["claim"] else []
    lines += [table["note"]] if table["note"] else []
    return ["", *lines] if lines else []


def _cells(table: dict[str, Any]) -> list[list[str]]:
    if table["claim"]:
        return _curve_cells(table)
    reference, several = table["reference"], len({row["column"] for row in table["rows"]}) > 1
    if not table["label"]:
        return _own_cells(table, several=several)
    cells = [
        ["row", *(["column"] if several else []), "claim", "here", "here - claim", f"here - {reference}",
         f"claim - {reference}", "claim in interval"]
    ]  # fmt: skip
    for row in table["rows"]:
        if row["column"] in table["absent"]:
            continue
        holds = {True: "yes", False: "no", None: "-"}[row["interval_holds_claim"]]
        cells.append(
            [row["row"], *([row["column"]] if several else []), f"{row['claim']:.1f}", spread_text(row["measured"]),
             signed(row["deviation"]), difference_text(row["difference"]), signed(row["claimed_difference"]), holds]
        )  # fmt: skip
    return cells


def _own_cells(table: dict[str, Any], *, several: bool) -> list[list[str]]:
    head = ["row", *(["column"] if several else []), "here", f"here - {table['reference']}"]
    texts = [[spread_text(row["measured"]), difference_text(row["difference"])] for row in table["rows"]]
    places = [[row["row"], *([row["column"]] if several else [])] for row in table["rows"]]
    return [head, *(place + text for place, text in zip(places, texts, strict=True))]


def _curve_cells(table: dict[str, Any]) -> list[list[str]]:
    reference = table["reference"]
    at = [f"at {share:.0%}" for share, _ in table["rows"][0]["at"]]
    cells = [["row", *at, "mean of the curve", f"- {reference}", "steps to the common level", f"- {reference}"]]
    for row in table["rows"]:
        heights = ["-" if value is None else f"{value:.1f}" for _, value in row["at"]]
        cells.append(
            [row["row"], *heights, spread_text(row["over_run"]), difference_text(row["difference"]),
             spread_text(row["steps_to_level"], digits=0), difference_text(row["steps_difference"], digits=0)]
        )  # fmt: skip
    return cells
