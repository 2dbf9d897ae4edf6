"""The matrix: every model and layer of the tests x every engine x four precisions, against the float64 oracle.

    python tests/slow/matrix.py                                          # everything, an hour on one core
    python tests/slow/matrix.py --output benchmarks/results/matrix.json
    python tests/slow/matrix.py --quick                                  # every row, default and ghost, float64
    python tests/slow/matrix.py --rows 'conv|timm/' --engines ghost loop --precisions float32
    python tests/slow/matrix.py --resume                                 # goes on where it was stopped
    python tests/slow/matrix.py --report --output matrix.json            # what has been measured so far

A cell is a row, an engine and a precision: several calls with `fused` on and off and different chunks, each compared in
five quantities (matrix_cells.py). The oracle (tests/support/oracle.py) is a loop over samples on a float64 copy of the
model, and shares no code with the library. A cell ends as

    pass      inside the bounds of the contract (SPEC section 5)
    dtype     beyond them, and so is the oracle itself when it computes in that precision: at most three times its error
              (half precision: twice, and a few units in the last place; anything, where not a digit of it is right)
    refused   by name, where the row says that it must be
    xfail     a known bug of torch, with its thread; if such a cell passes, that is an error as well
    wrong     anything else: beyond the bounds, an error that is not the library's own, a refusal that was not expected

Finished cells are appended to a file of JSON lines, from which `--resume` continues. The exit status is 1 if a cell is
wrong. Rows that need timm or torchvision where they are not installed are skipped, loudly, and counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "tests")]
from environment import write_result
from matrix_cells import ENGINES, PRECISIONS, QUANTITIES, Cell, References, measure, rows

from support.operator_zoo import REFUSED
from support.whole_models import PAIRS as WHOLE_PAIRS
from support.whole_models import WHOLE_CASES, installed, needs
from support.zoo import PAIRS, Case

QUICK = {"engines": ["auto", "ghost"], "precisions": ["float64"]}

_ATTENTION = (
    r"vit.*|timm/vit.*|torchvision/vit|language_model.*|sequence_first|transformer_.*"
    r"|attention_(functional|cross|zero_attn)"
)
# Under autocast a model may be refused where it is not in full precision: (row, engine, precision) by pattern, and why.
REFUSED_IN_HALF: list[tuple[str, str, str, str]] = [
    (_ATTENTION, "vmap", ".* autocast", "attention by its formula mixes dtypes under vmap, inside torch"),
]
# Bugs of torch that make a cell wrong: (row, engine, precision) by pattern, and the thread.
XFAIL: list[tuple[str, str, str, str]] = []


def refusal_expected(case: Case, engine: str, precision: str) -> bool:
    """Whether the row says that this engine refuses it."""
    if case.name in REFUSED:
        return True
    if {"vmap": case.vmap, "ghost": case.ghost}.get(engine.split(",")[0], "exact") == "refused":
        return True
    return any(_matches(entry, case.name, engine, precision) for entry in REFUSED_IN_HALF)


def _matches(entry: tuple[str, str, str, str], *names: str) -> bool:
    return all(re.fullmatch(pattern, name) for pattern, name in zip(entry, names, strict=False))


def cell(references: References, engine: str, precision: str, *, quick: bool) -> Cell:
    """One cell, measured, and held against what is known of it."""
    name = references.case.name
    expected = refusal_expected(references.case, engine, precision)
    found = measure(references, engine, precision, quick=quick, refused=expected)
    thread = next((entry[3] for entry in XFAIL if _matches(entry, name, engine, precision)), None)
    if thread is not None:
        known = found.verdict == "wrong"
        found.verdict = "xfail" if known else "wrong"
        found.reason = f"{thread}: {found.reason}" if known else f"passes, though it is listed as a bug: {thread}"
    return found


class Log:
    """Finished cells, as JSON lines behind a line that says what they are.

    Args:
        path: of the file.
        header: what must be equal for cells to be comparable.
        resume: whether to keep what is there.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        self.cells: dict[tuple[str, str, str], Cell] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.exists():
            first, *lines = path.read_text(encoding="utf-8").splitlines()
            if json.loads(first) != header:
                raise SystemExit(f"{path} is of another run ({first}): without --resume it is written anew.")
            for line in lines:
                with_key = _parsed(line)
                if with_key is not None:
                    self.cells[with_key[0]] = with_key[1]
        else:
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def add(self, key: tuple[str, str, str], found: Cell) -> None:
        """Keeps a cell."""
        self.cells[key] = found
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **asdict(found)}) + "\n")


def _parsed(line: str) -> tuple[tuple[str, str, str], Cell] | None:
    """A line of the log; None for one that was cut short by a kill."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    row, engine, precision = entry.pop("key")
    return (row, engine, precision), Cell(**entry)


def line(found: Cell) -> str:
    """A cell in one line: verdict, calls and errors, or verdict, calls and reason."""
    if found.verdict in ("refused", "xfail", "wrong"):
        return f"{found.verdict} {found.calls} {found.reason}"
    errors = " ".join(f"{found.errors[key]:.1e}" if key in found.errors else "-" for key in QUANTITIES)
    own = f" {found.own.get('gradient', 0.0):.1e}" if found.own else ""
    return f"{found.verdict} {found.calls} {errors}{own}"


def result(log: Log, zoos: dict[str, str], skipped: dict[str, str], *, quick: bool) -> dict[str, Any]:
    """What the result file says."""
    cells: dict[str, Any] = {}
    for (row, engine, precision), found in log.cells.items():
        if row in zoos:
            cells.setdefault(row, {}).setdefault(precision, {})[engine] = line(found)
    kept = [(key, found) for key, found in log.cells.items() if key[0] in zoos]
    return {
        "setting": {"pairs": PAIRS, "pairs of whole models": WHOLE_PAIRS, "quick": quick},
        "columns": ["verdict", "calls", *QUANTITIES, "gradient of the oracle in the same precision, where asked"],
        "bounds": {
            name: {
                "cosine": p.bounds[0],
                "gradient": p.bounds[1] if math.isfinite(p.bounds[1]) else None,
                "direction": p.direction if math.isfinite(p.direction) else None,
            }
            for name, p in PRECISIONS.items()
        },
        "counts": dict(Counter(found.verdict for _, found in kept)),
        "calls": sum(found.calls for _, found in kept),
        "zoos": {zoo: [row for row in cells if zoos[row] == zoo] for zoo in dict.fromkeys(zoos.values())},
        "skipped": skipped,
        "cells": cells,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", metavar="REGEX", help="only rows whose name matches")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--quick", action="store_true", help="every row in two calls: default and ghost, float64")
    parser.add_argument("--resume", action="store_true", help="go on with the cells of --log")
    parser.add_argument("--report", action="store_true", help="measure nothing: only what --log holds")
    parser.add_argument("--log", type=Path, default=Path("build/matrix.jsonl"), help="finished cells")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    logging.getLogger("gradconsist").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if options.quick:
        options.engines, options.precisions = QUICK["engines"], QUICK["precisions"]

    chosen = [(zoo, case) for zoo, case in rows() if re.search(options.rows, case.name)]
    skipped = {}
    for _, case in chosen:
        package = needs(case.name)
        if package is not None and installed(package) is not None:
            skipped[case.name] = f"{package} cannot be used here: {installed(package)}"
    zoos = {case.name: zoo for zoo, case in chosen if case.name not in skipped}
    header = {"torch": torch.__version__, "quick": options.quick}
    log = Log(options.log, header, resume=options.resume or options.report)
    if not options.report:
        _run([case for _, case in chosen if case.name in zoos], log, options)

    wanted = {(row, engine, p) for row in zoos for engine in options.engines for p in options.precisions}
    kept = {key: found for key, found in log.cells.items() if key in wanted}
    for key, found in kept.items():
        if found.verdict == "wrong":
            print(f"WRONG: {', '.join(key)}: {found.reason}")
    for row, reason in skipped.items():
        print(f"SKIPPED: {row}: {reason}")
    counts = Counter(found.verdict for found in kept.values())
    print(f"{len(zoos)} rows, {len(kept)} cells, {sum(c.calls for c in kept.values())} calls: {dict(counts)};")
    print(f"{len(skipped)} rows skipped; silently wrong: {counts['wrong']}")
    if options.output is not None:
        write_result(options.output, result(log, zoos, skipped, quick=options.quick))
    return 1 if counts["wrong"] else 0


def _run(cases: list[Case], log: Log, options: argparse.Namespace) -> None:
    """Measures what is missing; a line a row, with the time that is left."""
    columns = [(engine, precision) for precision in options.precisions for engine in options.engines]
    missing = {c.name: [x for x in columns if (c.name, *x) not in log.cells] for c in cases}
    weight = {name: len(cells) * (20 if name in WHOLE_CASES else 1) for name, cells in missing.items()}
    total, done, start = sum(weight.values()), 0, time.perf_counter()
    for case in cases:
        if not missing[case.name]:
            continue
        references = References(case, WHOLE_PAIRS if case.name in WHOLE_CASES else PAIRS)
        verdicts: Counter[str] = Counter()
        for engine, precision in missing[case.name]:
            found = cell(references, engine, precision, quick=options.quick)
            log.add((case.name, engine, precision), found)
            verdicts[found.verdict] += 1
        done += weight[case.name]
        spent = time.perf_counter() - start
        left = spent * (total - done) / done
        print(f"{case.name}: {dict(verdicts)}  [{spent:.0f} s, {left:.0f} s left]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
