"""The laws of tests/core/properties on many examples: which hold, on how many, bit for bit or within what.

    python tests/slow/properties.py --examples 200        # about a quarter of an hour on one core
    python tests/slow/properties.py --examples 5000       # a night
    python tests/slow/properties.py --quick               # a few examples, nothing written

The same functions as in the test suite, with more examples of hypothesis and, with `--seed`, others. For every law and
engine: examples asked for, examples that were effective (run to the end, and not seen before), what was equal bit for
bit in how many of them, and the largest deviation where the law has a tolerance. The exit status is 1 if a law is
broken or if fewer than nine tenths of its examples were effective.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks/shared", "tests")]
from environment import write_result

from support.laws import LAWS, Law


def load_laws() -> None:
    """Imports the files of laws, each of which adds its own to `LAWS`."""
    for path in sorted((ROOT / "tests" / "core" / "properties").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"properties_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)


def examine(law: Law, engine: str, examples: int, seed: int) -> dict[str, Any]:
    """One row: the law with one engine."""
    row: dict[str, Any] = {"law": law.number, "name": law.name, "engine": engine, "asked": examples}
    start = time.process_time()
    try:
        tally = law.check(engine, examples, seed)
    except Exception as error:  # a broken law is a row, and the exit status
        notes = " ".join(getattr(error, "__notes__", []))
        return row | {"holds": False, "error": f"{type(error).__name__}: {error} {notes}".strip()}
    return row | {
        "holds": tally.effective >= 0.9 * examples,
        "tried": tally.asked,
        "effective": tally.effective,
        "bitwise": {what: {"equal": equal, "of": total} for what, (equal, total) in tally.bitwise.items()},
        "worst": {what: {"deviation": error, "bound": bound} for what, (error, bound) in tally.worst.items()},
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def describe(row: dict[str, Any]) -> str:
    """A row in one line."""
    head = f"{row['name']:<46} {row['engine']:<6}"
    if "error" in row:
        return f"{head} BROKEN  {row['error']}"
    parts = [f"{what}: {found['equal']}/{found['of']} bitwise" for what, found in row["bitwise"].items()]
    parts += [f"{what}: {found['deviation']:.1e} of {found['bound']:.1e}" for what, found in row["worst"].items()]
    verdict = "" if row["holds"] else "TOO FEW  "
    return f"{head} {verdict}{row['effective']:>5} of {row['asked']} effective  {'; '.join(parts)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200, help="examples for each law and engine")
    parser.add_argument("--seed", type=int, default=0, help="other examples than those of the suite")
    parser.add_argument("--only", nargs="+", metavar="LAW", help="for example P4 P10")
    parser.add_argument("--quick", action="store_true", help="three examples each; nothing is written")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "properties.json")
    options = parser.parse_args()
    load_laws()
    examples = 3 if options.quick else options.examples
    laws = sorted(LAWS.values(), key=lambda law: (int(law.number[1:]), law.name))
    rows = []
    for law in laws:
        for engine in law.engines:
            if options.only is None or law.number in options.only:
                rows.append(examine(law, engine, examples, options.seed))
                print(describe(rows[-1]), flush=True)
    broken = [row for row in rows if not row["holds"]]
    numbers = sorted({row["law"] for row in rows}, key=lambda number: int(number[1:]))
    effective = sum(row.get("effective", 0) for row in rows)
    print(f"{len(numbers)} laws, {len(rows)} rows, {effective} effective examples, {len(broken)} broken")
    if not options.quick and options.only is None:
        setting = {"examples": examples, "seed": options.seed, "dtype": "as drawn", "threads": torch.get_num_threads()}
        write_result(options.output, {"setting": setting, "laws": numbers, "broken": len(broken), "rows": rows})
    return 1 if broken or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
