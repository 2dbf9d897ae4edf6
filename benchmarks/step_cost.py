"""What the exact term costs: a FixMatch step with it against the same step without it, measured in alternation.

    python benchmarks/step_cost.py --output benchmarks/results/step_cost.json

The step without the term is the split FixMatch step: labeled and strong inputs forward and backward, weak inputs
forward without a graph. Every pair counts (no mask). Each round runs every variant once, in an order that changes from
round to round; the ratio of a round is its variant's time over the plain step's of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import write_result
from torch import nn

from gradconsist import GradientConsistencyLoss, SSLBatch
from gradconsist.methods import FixMatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from recipes.models import build_model  # the trainers' WRN, on the path since the line above

VARIANTS: dict[str, dict[str, object]] = {
    "vmap, chunk 1": {"engine": "vmap", "chunk_size": 1},
    "vmap, chunk 4": {"engine": "vmap", "chunk_size": 4},
    "vmap, chunk 8": {"engine": "vmap", "chunk_size": 8},
    "vmap, chunk 16 (default on CPU)": {"engine": "vmap", "chunk_size": 16},
    "vmap, all pairs": {"engine": "vmap", "chunk_size": None},
    "loop": {"engine": "loop"},
    "default, max_pairs=8": {"max_pairs": 8},
    "vmap, chunk 8, stop_gradient='weak'": {"engine": "vmap", "chunk_size": 8, "stop_gradient": "weak"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="wrn-28-2")
    parser.add_argument("--labeled", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=56)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a machine that is shared"
    )
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = build_model(options.arch, 10, momentum=0.1).to(options.device)
    batch = _batch(options)
    steps: dict[str, Callable[[], None]] = {"without the term": lambda: _step(model, batch, None)}
    for name in options.only:
        gc = GradientConsistencyLoss(model, encoder=model.encoder, **VARIANTS[name])  # type: ignore[arg-type]
        steps[name] = lambda gc=gc: _step(model, batch, gc)  # type: ignore[misc]

    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # first calls allocate, probe and choose kernels
        step()
    for round_ in range(options.rounds):
        names = list(steps)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            times[name].append(_timed(steps[name], options))

    rows = []
    for name, seconds in times.items():
        ratios = [mine / plain for mine, plain in zip(seconds, times["without the term"], strict=True)]
        rows.append(
            {
                "variant": name,
                "seconds_median": statistics.median(seconds),
                "ratio_median": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        )
        print(f"{name:32s} {rows[-1]['seconds_median']:8.3f} s   {rows[-1]['ratio_median']:6.2f}x"
              f"   ({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    setting = {
        key: getattr(options, key) for key in ("arch", "labeled", "pairs", "image_size", "rounds", "device", "clock")
    }
    if options.output:
        write_result(options.output, {"setting": {**setting, "dtype": "float32"}, "rows": rows})


def _batch(options: argparse.Namespace) -> SSLBatch:
    size = (3, options.image_size, options.image_size)
    x = torch.randn(options.labeled, *size)
    weak = torch.randn(options.pairs, *size)
    strong = weak + 0.5 * torch.randn_like(weak)
    y = torch.randint(10, [options.labeled])
    return SSLBatch(*(tensor.to(options.device) for tensor in (x, y, weak, strong)))


def _step(model: nn.Module, batch: SSLBatch, gc: GradientConsistencyLoss | None) -> None:
    """One split FixMatch step without the optimizer; threshold 0 lets every pair count."""
    model.zero_grad()
    out = FixMatch(model, threshold=0.0, joint=False)(batch)
    loss = out.loss
    if gc is not None and out.pair is not None:
        loss = loss + 0.1 * gc(*out.pair)
    loss.backward()


def _timed(step: Callable[[], None], options: argparse.Namespace) -> float:
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    start = clock()
    step()
    if options.device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
