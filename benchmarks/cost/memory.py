"""Peak memory of a step with the exact term, against FixMatch's own peak on the same batch; a process for each point.

    python benchmarks/cost/memory.py --output benchmarks/results/memory.json

Compared are the default settings, the ghost engine at several chunks, vmap of grad, the per-sample loop and BackPACK
with create_graph, at several numbers of pairs on WRN-28-2; the plain CNN, which BackPACK takes; and ResNet-50 at
224 x 224 with 16 pairs. point.py says how a peak is taken. Errors are against the tests' float64 loop, on a few
of the same pairs. A point that fails, is refused or runs out of time is a row with the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/shared"))
from environment import write_result
from harness import Row, heading, parse, parser, setting, show
from point import measure, memory_limit
from steps import PLAIN

WRN = (
    PLAIN, "default", "ghost, chunk 4", "ghost, chunk 14", "ghost, chunk 28", "vmap, chunk 4", "vmap, chunk auto",
    "loop", "BackPACK, chunk 16",
)  # fmt: skip
CNN = (PLAIN, "default", "vmap, chunk 16", "loop", "BackPACK, chunk 16")
LARGE = (PLAIN, "default", "ghost, chunk 4", "vmap, chunk auto", "loop")
QUICK = (PLAIN, "default", "ghost, chunk 4", "vmap, chunk 4", "BackPACK, chunk 16")
COLUMNS = {
    "model": "<10", "pairs": "5d", "variant": "<18", "peak_mb": "9.0f", "peak_ratio": "10.2f", "seconds_median": "9.2f",
    "time_ratio": "10.2f", "cosine_error": "12.1e", "gradient_error": "14.1e",
}  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--pairs", nargs="+", type=int, default=[56, 112, 224, 448])
    made.add_argument("--only", nargs="+", default=list(dict.fromkeys([*WRN, *CNN, *LARGE])), help="of the variants")
    made.add_argument("--steps", type=int, default=2, help="steps of a point; the first one probes")
    made.add_argument("--timeout", type=float, default=3600, help="seconds for one point")
    made.add_argument("--large-size", type=int, default=224, help="image size of ResNet-50; 0 leaves it out")
    made.add_argument("--large-pairs", type=int, default=16)
    made.add_argument("--oracle-pairs", type=int, default=1)
    options = parse(made, pairs=[7], steps=1, large_size=64, large_pairs=2)
    groups: list[tuple[str, int, int | None, tuple[str, ...]]] = [
        ("wrn-28-2", pairs, None, WRN) for pairs in options.pairs
    ]
    groups.append(("cnn", options.pairs[0], None, CNN))
    if options.large_size:
        groups.append(("resnet-50", options.large_pairs, options.large_size, LARGE))
    rows: list[Row] = []
    heading(COLUMNS)
    for model, pairs, image_size, variants in groups:
        base: Row | None = None
        for variant in (name for name in variants if name in (QUICK if options.quick else (PLAIN, *options.only))):
            point: dict[str, Any] = {
                "model": model, "variant": variant, "labeled": max(1, pairs // 7), "pairs": pairs,
                "image_size": image_size, "steps": options.steps, "threads": options.threads, "clock": options.clock,
                "device": options.device, "oracle_pairs": options.oracle_pairs,
            }  # fmt: skip
            row = measure(point, timeout=options.timeout, limit_bytes=memory_limit())
            base = row if variant == PLAIN else base
            rows.append(with_ratios(row, base))
            show([rows[-1]], COLUMNS)
        if options.output:  # so that a run that is stopped keeps what it has
            used = setting(options, "pairs", "steps", "large_size", "large_pairs", "threads")
            write_result(options.output, {"setting": used, "rows": rows})


def with_ratios(row: Row, base: Row | None) -> Row:
    """The row with its peak and time over those of the step without the term, where both were measured."""
    if row["reason"] is not None:
        return row
    row["peak_mb"] = row["peak_bytes"] / 2**20
    if base is not None and base["reason"] is None:
        row["peak_ratio"] = row["peak_bytes"] / base["peak_bytes"]
        row["time_ratio"] = row["seconds_median"] / base["seconds_median"]
    return row


if __name__ == "__main__":
    main()
