"""The tables from the runs of a grid, the paper's beside its claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from trainer.claims import CLAIMS, Claim
from trainer.grid import Grid, papers_protocol
from trainer.runs import Run, read_run
from trainer.statistics import CONFIDENCE, paired_difference, spread

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
            measured = dataclasses.asdict(spread(list(values.values()))) if values else None
            own = row == claim.reference
            difference = None if own else paired_difference(values, reference)
            apart = None if claimed is None or own else round(claimed - claim.accuracy[claim.reference, column], 6)
            yield {
                "row": row, "column": column, "variant": variant, "claim": claimed, "by_seed": _keys(values),
                "measured": measured,
                "deviation": measured["mean"] - claimed if measured and claimed is not None else None,
                "difference": dataclasses.asdict(difference) if difference else None,
                "claimed_difference": apart,
                "interval_holds_claim": difference.contains(apart) if difference and apart is not None else None,
            }  # fmt: skip


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
        differences: dict[str, dict[str, Any] | None] = {"difference": None, "steps_difference": None}
        if row != claim.reference:
            differences = {
                name: dataclasses.asdict(found) if found else None
                for name, found in (
                    ("difference", paired_difference(height[row], height[claim.reference])),
                    ("steps_difference", paired_difference(reached[row], reached[claim.reference])),
                )
            }
        rows.append(
            {
                "row": row, "column": column, "variant": claim.rows[row],
                "at": [[share, _at(list(by_seed.values()), share)] for share in SHARES],
                "over_run": dataclasses.asdict(spread(list(height[row].values()))) if by_seed else None,
                "steps_to_level": dataclasses.asdict(spread(list(reached[row].values()))) if seeds else None,
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
