"""How time and peak memory of the exact term grow: with pairs, with parameters (width), and with image size.

    python benchmarks/cost/scaling.py --output benchmarks/results/scaling.json

One axis is varied at a time around WRN-28-2, 32x32, 28 pairs. Each point is a process of its own (point.py),
for the FixMatch step alone, the default settings, vmap of grad and the per-sample loop; ratios are to the step alone at
the same point, measured in another process, one after the other: for ratios to quote, see step_cost.py. Errors are
against the tests' float64 loop on one of the pairs. A point that fails is a row with the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/shared"))
from environment import write_result
from harness import Row, heading, parse, parser, setting, show
from memory import with_ratios
from point import measure, memory_limit
from steps import PLAIN

VARIANTS = (PLAIN, "default", "vmap, chunk auto", "loop")
AXES: dict[str, tuple[int, ...]] = {
    "pairs": (7, 14, 28, 56, 112),
    "width": (1, 2, 4, 8),
    "image_size": (16, 32, 48, 64),
}
QUICK: dict[str, tuple[int, ...]] = {"pairs": (4, 8), "width": (1, 2), "image_size": (16, 32)}
COLUMNS = {
    "axis": "<10", "value": "5d", "parameters": "10d", "variant": "<18", "seconds_median": "9.2f",
    "time_ratio": "10.2f", "peak_mb": "9.0f", "peak_ratio": "10.2f",
    "cosine_error": "12.1e", "gradient_error": "14.1e",
}  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--depth", type=int, default=28, help="of the WRN")
    made.add_argument("--pairs", type=int, default=28, help="where they are not varied")
    made.add_argument("--steps", type=int, default=4, help="steps of a point; the first one is not in the median")
    made.add_argument("--timeout", type=float, default=1800, help="seconds for one point")
    made.add_argument("--oracle-pairs", type=int, default=1)
    options = parse(made, depth=10, pairs=7, steps=2)
    rows: list[Row] = []
    heading(COLUMNS)
    for axis, values in (QUICK if options.quick else AXES).items():
        for value in values:
            chosen = {"pairs": options.pairs, "width": 2, "image_size": 32} | {axis: value}
            base: Row | None = None
            for variant in VARIANTS:
                point: dict[str, Any] = {
                    "axis": axis, "value": value, "model": f"wrn-{options.depth}-{chosen['width']}", "variant": variant,
                    "pairs": chosen["pairs"], "labeled": max(1, chosen["pairs"] // 7),
                    "image_size": chosen["image_size"], "steps": options.steps, "threads": options.threads,
                    "clock": options.clock, "device": options.device, "oracle_pairs": options.oracle_pairs,
                }  # fmt: skip
                row = measure(point, timeout=options.timeout, limit_bytes=memory_limit())
                base = row if variant == PLAIN else base
                rows.append(with_ratios(row, base))
                show([rows[-1]], COLUMNS)
        if options.output:  # so that a run that is stopped keeps what it has
            write_result(
                options.output, {"setting": setting(options, "depth", "pairs", "steps", "threads"), "rows": rows}
            )


if __name__ == "__main__":
    main()
