"""Exactness of every engine, as a table: worst errors against the float64 oracle of the tests.

    python benchmarks/exactness.py                                     # prints the table
    python benchmarks/exactness.py --output benchmarks/results/exactness.json

A row is one model of the zoo; the errors are the worst over `fused` on and off and chunk sizes 1, 3 and all:

    cosine      max over pairs of |GC - GC_oracle|
    gradient    |g - g_oracle| / |g_oracle|, g = dL_g/dtheta over every trainable parameter as one vector

The oracle (tests/support/oracle.py) is a loop over samples on a float64 copy of the model and shares no code with the
library.  The exit status is 1 if a value is beyond the bounds, so that nobody quotes a table that does not hold.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from environment import write_result

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from gradconsist import GradientConsistencyLoss
from gradconsist.engines import Engine, GhostEngine
from gradconsist.errors import UnsupportedModuleError
from support import compare
from support.oracle import Verdict
from support.zoo import CASES, PAIRS, Case

ENGINES: dict[str, Callable[[], str | Engine]] = {
    "loop": lambda: "loop",
    "vmap": lambda: "vmap",
    "ghost": lambda: "ghost",
    "ghost, gradient form": lambda: GhostEngine(form="gradient"),
    "ghost, gram form": lambda: GhostEngine(form="gram"),
}
CHUNKS = (1, 3, None)
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One cell of the measurement; `refused` instead of errors where the engine does not take the model."""

    model: str
    engine: str
    dtype: str
    fused: bool
    chunk_size: int | None
    cosine_error: float | None
    gradient_error: float | None
    refused: bool


def measure(case: Case, engine: str, dtype: str) -> Iterator[Row]:
    """All cells of one model, engine and dtype."""
    verdict: Verdict = case.problem(dtype=DTYPES[dtype]).judge().verdict()
    for fused in (True, False):
        for chunk_size in CHUNKS:
            problem = case.problem(dtype=DTYPES[dtype])
            gc = GradientConsistencyLoss(
                problem.model,
                encoder=case.encoder,
                loss_fn=case.loss_fn,
                engine=ENGINES[engine](),
                fused=fused,
                chunk_size=chunk_size,
            )
            try:
                gradient = compare.gradient_of(gc(*problem.views), problem.model)
            except UnsupportedModuleError:
                yield Row(case.name, engine, dtype, fused, chunk_size, None, None, refused=True)
                continue
            assert gc.last is not None
            cosine_error = compare.cosine_error(gc.last.cosine, verdict.cosine)
            gradient_error = compare.relative(gradient, verdict.flat)
            yield Row(case.name, engine, dtype, fused, chunk_size, cosine_error, gradient_error, refused=False)


def broken(row: Row) -> bool:
    """Whether a cell is beyond the bounds of its dtype."""
    if row.cosine_error is None or row.gradient_error is None:
        return False
    cosine, gradient = compare.TOLERANCE[DTYPES[row.dtype]]
    return not (row.cosine_error <= cosine and row.gradient_error <= gradient)


def summarise(cells: list[Row]) -> tuple[str, str]:
    """Worst cosine and gradient error of some cells, as text."""
    if not cells or all(cell.refused for cell in cells):
        return "refused", "refused"
    measured = [cell for cell in cells if not cell.refused]
    cosine = compare.worst(cell.cosine_error or 0.0 for cell in measured)
    gradient = compare.worst(cell.gradient_error or 0.0 for cell in measured)
    return f"{cosine:.1e}", f"{gradient:.1e}"


def table(rows: list[Row]) -> str:
    """Markdown: a model a row, cosine and gradient error for each engine and dtype."""
    columns = [(engine, dtype) for dtype in DTYPES for engine in ENGINES]
    heads = [f"{engine} {dtype} {what}" for engine, dtype in columns for what in ("cos", "grad")]
    lines = ["| model | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    names = list(dict.fromkeys(row.model for row in rows))
    for name in [*names, None]:
        cells: list[str] = []
        for engine, dtype in columns:
            cells += summarise([r for r in rows if name in (None, r.model) and (r.engine, r.dtype) == (engine, dtype)])
        lines.append(f"| {name or '**worst**'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the cells as JSON")
    parser.add_argument("--models", nargs="+", choices=sorted(CASES), default=list(CASES), help="default: all")
    options = parser.parse_args()
    logging.getLogger("gradconsist").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows = [
        row
        for name in options.models
        for dtype in DTYPES
        for engine in ENGINES
        for row in measure(CASES[name], engine, dtype)
    ]
    print(table(rows))
    failures = [row for row in rows if broken(row)]
    refused = sum(row.refused for row in rows)
    print(f"\n{len(rows)} cells: {len(rows) - refused - len(failures)} exact, {refused} refused, {len(failures)} wrong")
    for row in failures:
        print(f"WRONG: {row}")
    if options.output is not None:
        bounds = {name: compare.TOLERANCE[dtype] for name, dtype in DTYPES.items()}
        write_result(options.output, {"pairs": PAIRS, "bounds": bounds, "rows": [asdict(row) for row in rows]})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
