"""Two threads that compare at the same time, round after round, each held bitwise against what it gets alone.

    python tests/slow/concurrency.py            # 500 rounds of the default, 50 of each engine; results/concurrency.json
    python tests/slow/concurrency.py --quick    # 10 rounds, nothing written

Exit status 1 where a value differs, an error is raised, or the model is not as it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks/shared", "tests")]
from environment import write_result

from support import state
from support.threads import delicate, in_threads, work

RESULT = ROOT / "benchmarks" / "results" / "concurrency.json"
ROUNDS = {"auto": 500, "loop": 50, "vmap": 50, "ghost": 50}


def trial(engine: str, rounds: int, *, shared: bool) -> dict[str, Any]:
    """Two threads on one model, or on one each."""
    first = delicate(0)
    before = state.of_model(first)
    start = perf_counter()
    networks = [first, first if shared else delicate(1)]
    differing, errors = in_threads([work(network, engine=engine, chunk_size=4) for network in networks], rounds)
    return {
        "engine": engine,
        "threads_on": "one model" if shared else "two models",
        "rounds": rounds,
        "comparisons": 2 * rounds,
        "differing": differing,
        "errors": sorted(set(errors)),
        "model_intact": state.differences(before, state.of_model(first)) == [],
        "seconds": round(perf_counter() - start, 1),
    }


def main() -> int:
    """Runs all trials and prints them."""
    parser = argparse.ArgumentParser(description="Two threads that compare at the same time.")
    parser.add_argument("--quick", action="store_true", help="10 rounds, nothing written")
    options = parser.parse_args()
    wanted = dict.fromkeys(ROUNDS, 10) if options.quick else ROUNDS
    rows = [trial(engine, rounds, shared=shared) for engine, rounds in wanted.items() for shared in (True, False)]
    for row in rows:
        print(row)
    if not options.quick:
        write_result(RESULT, {"rows": rows})
    return int(any(row["differing"] or row["errors"] or not row["model_intact"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
