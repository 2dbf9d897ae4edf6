"""DDP(GGCRWrapper(...)) on 2, 3 and 4 gloo processes against one process on the joined batch, in float64.

    python tests/slow/distributed.py --output benchmarks/results/distributed.json      # minutes
    python tests/slow/distributed.py --quick                                           # 2 processes, ghost only

Each row is one case of `tests/support/ddp.py` (options of DDP, accumulation, empty masks, uneven batches, BatchNorm,
checkpoints, ...) by one engine, fused or not:

    gradient      worst rank's |g - g_joined| / |g_joined| of the first step; g_joined is FixMatch by hand plus the
                  float64 oracle, which share no code with the library
    parameters    after --steps steps: the worst rank against the library in one process, same measure; and whether
                  all ranks' parameters are bitwise equal

The exit status is 1 if an error is over 1e-10, if ranks differ, or if a refusal is not among those expected: vmap and
ghost do not take activation checkpoints.  A rank that is silent for 60 seconds ends the program.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "tests")]
from environment import write_result

from support import ddp
from support.processes import Processes

BOUND = 1e-10
ENGINES = ("ghost", "loop", "vmap", "auto")


@cache
def judged(world: int, name: str) -> dict[str, torch.Tensor]:
    """The expected gradient of a case, which no engine has a part in."""
    return ddp.judge(ddp.gradient_cases(world)[name])


def first_steps(ranks: Processes, engine: str, fused: bool) -> list[dict[str, Any]]:
    """One row a case."""
    rows = []
    for name, case in ddp.gradient_cases(ranks.world).items():
        spec = replace(case, loss={"engine": engine, "fused": fused})
        found = ranks.run(ddp.attempt, spec)
        row: dict[str, Any] = {"world": ranks.world, "case": name, "engine": engine, "fused": fused}
        if isinstance(found[0], str):
            row["refused"] = found[0]
            row["right"] = name.startswith("checkpointed") and engine in {"ghost", "vmap"}
        else:
            expected = judged(ranks.world, name)
            row["gradient_error"] = max(ddp.error(rank["gradient"], expected) for rank in found)
            row["right"] = row["gradient_error"] <= BOUND
        rows.append(row)
    return rows


def long_run(ranks: Processes, engine: str, steps: int) -> dict[str, Any]:
    """Parameters after many steps."""
    spec = ddp.Spec(ranks.world, loss={"engine": engine}, steps=steps)
    found = [rank["parameters"] for rank in ranks.run(ddp.train, spec)]
    expected = ddp.alone(spec)["parameters"]
    worst = max(ddp.error(parameters, expected) for parameters in found)
    equal = all(torch.equal(parameters[name], p) for parameters in found for name, p in found[0].items())
    row = {"world": ranks.world, "case": f"{steps} steps", "engine": engine, "fused": True}
    return row | {"parameter_error": worst, "bitwise_equal_ranks": equal, "right": worst <= BOUND and equal}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 processes, ghost only")
    parser.add_argument("--worlds", type=int, nargs="+", help="numbers of processes (default: 2 3 4)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES)
    parser.add_argument("--steps", type=int, default=50, help="of the long run")
    parser.add_argument("--output", type=Path, help="write rows and environment as JSON")
    options = parser.parse_args()
    worlds = options.worlds or ([2] if options.quick else [2, 3, 4])
    engines = options.engines or (["ghost"] if options.quick else list(ENGINES))
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for world in worlds:
        started = time.perf_counter()
        with Processes(world) as ranks:
            for engine in engines:
                for fused in (True, False):
                    rows += first_steps(ranks, engine, fused)
                rows.append(long_run(ranks, engine, options.steps))
        here = [row for row in rows if row["world"] == world]
        errors = [row.get("gradient_error", row.get("parameter_error", 0.0)) for row in here]
        refused, wrong = sum("refused" in row for row in here), [row for row in here if not row["right"]]
        print(
            f"{world} processes: {len(here)} rows, {refused} refused, worst error {max(errors):.1e}, wrong: {wrong},"
            f" {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    if options.output:
        worst = {
            str(world): max(
                row.get("gradient_error", row.get("parameter_error", 0.0)) for row in rows if row["world"] == world
            )
            for world in worlds
        }
        write_result(options.output, {"bound": BOUND, "worst_error": worst, "rows": rows})
    return int(not all(row["right"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
