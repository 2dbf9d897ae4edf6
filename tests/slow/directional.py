"""The gradient of L_g on whole models, against finite differences in float64.

    python tests/slow/directional.py                                   # 200 directions, 12 models
    python tests/slow/directional.py --quick                           # 5 directions, 4 models
    python tests/slow/directional.py --output benchmarks/results/directional.json

For a random direction v over all parameters, of the parameters' own length tensor by tensor,

    error(h) = |<g, v> - (L_g(theta + h v) - L_g(theta - h v)) / 2h| / s,    g the library's gradient,

with s = |g| |v| / sqrt(P), what a random v sees of g. L_g is the value of the tests' oracle (tests/support/oracle.py),
a loop of first derivatives that shares no code with the library; BatchNorm's statistics are held constant. Over h the
errors draw a V: curvature at large steps, rounding at small ones. Every direction is run at 1e-5 and 1e-6, and its
error is the lesser; one in ten is run at all steps.

Kinks: on models with ReLU, leaky ReLU or max-pooling the same directions are run as a control. A direction that keeps
its margin (the slopes at both steps agree to 1e-4) must agree; one that crosses a kink may not, and is counted.

The exit status is 1 if a smooth model exceeds 1e-6 in any direction, or a kinked one where it keeps its margin.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "tests")]
from environment import write_result

from gradconsist import GradientConsistencyLoss
from support import compare
from support.layer_zoo import LAYER_CASES
from support.oracle import Judge
from support.zoo import CASES

ZOO = {**CASES, **LAYER_CASES}
STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
ALWAYS = (1e-5, 1e-6)
EVERY = 10  # which directions are run at all steps
BOUND = 1e-6
PAIRS = 2
SMOOTH = (
    *("cnn_batchnorm_train", "cnn_groupnorm", "cnn_instancenorm", "vit", "transformer_layer", "attention_functional"),
    *("lstm", "rnn_tanh", "weight_norm_conv", "squeeze_excite", "tied_embedding", "bare_and_ruled"),
)
KINKED = ("mlp_inplace_relu", "wrn_slice", "basic_block", "pooling")


def directions(name: str, count: int) -> list[dict[str, Any]]:
    """Of one model: the errors of `count` directions by step, and whether each keeps its margin from kinks."""
    problem = ZOO[name].problem(pairs=PAIRS)
    oracle: Judge = problem.judge()
    gc = GradientConsistencyLoss(problem.model, encoder=problem.case.encoder, loss_fn=problem.case.loss_fn)
    flat = compare.gradient_of(gc(*problem.views), problem.model)
    sizes = [p.numel() for p in compare.trainable(problem.model)]
    gradient = dict(zip(oracle.trainable, flat.split(sizes), strict=True))
    padding = padding_rows(oracle.model)
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        v = {key: direction(p, padding.get(id(p)), generator) for key, p in oracle.trainable.items()}
        analytic = sum(float(gradient[key] @ part.reshape(-1)) for key, part in v.items())
        length = sum(float(part.square().sum()) for part in v.values()) ** 0.5
        scale = float(flat.norm()) * length / len(flat) ** 0.5
        slopes = {h: oracle.slope(v, step=h) for h in (STEPS if i % EVERY == 0 else ALWAYS)}
        errors = {h: abs(slope - analytic) / scale for h, slope in slopes.items()}
        found.append({"errors": errors, "margin": abs(slopes[1e-5] - slopes[1e-6]) / scale < 1e-4})
    return found


def padding_rows(model: nn.Module) -> dict[int, int]:
    """Rows of embeddings that have no gradient by definition."""
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None)
    return {id(m.weight): m.padding_idx for m in embeddings}


def direction(parameter: Tensor, padding: int | None, generator: torch.Generator) -> Tensor:
    v = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    if padding is not None:
        v[padding] = 0.0
    return v * ((float(parameter.detach().norm()) or 1.0) / float(v.norm()))


def summary(name: str, found: list[dict[str, Any]], *, kinked: bool) -> dict[str, Any]:
    """Median and maximum by step and at the best one; for kinked models over the directions with a margin."""
    kept = [each for each in found if each["margin"]] if kinked else found
    best = [min(each["errors"][h] for h in ALWAYS) for each in kept]
    curve = {h: [each["errors"][h] for each in kept if h in each["errors"]] for h in STEPS}
    return {
        "model": name,
        "directions": len(found),
        "crossed_a_kink": len(found) - len(kept),
        "median": median(best),
        "max": max(best),
        "median_by_step": {f"{h:.0e}": median(errors) for h, errors in curve.items()},
        "max_by_step": {f"{h:.0e}": max(errors) for h, errors in curve.items()},
        "max_with_kinks": max(min(each["errors"][h] for h in ALWAYS) for each in found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    parser.add_argument("--directions", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="5 directions, four models")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    tables: dict[str, list[dict[str, Any]]] = {"smooth": [], "kinked": []}
    groups = {"smooth": SMOOTH[: 3 if options.quick else None], "kinked": KINKED[: 1 if options.quick else None]}
    for kind, name in [(k, name) for k, names in groups.items() for name in names]:
        count = 5 if options.quick else options.directions
        row = summary(name, directions(name, count), kinked=kind == "kinked")
        tables[kind].append(row)
        curve = ", ".join(f"{h}: {error:.0e}" for h, error in row["median_by_step"].items())
        print(
            f"{kind} {name}: median {row['median']:.1e}, max {row['max']:.1e} over {row['directions']} directions,"
            f" {row['crossed_a_kink']} at a kink; median by step {curve}",
            flush=True,
        )
    over = [row["model"] for rows in tables.values() for row in rows if row["max"] > BOUND]
    print(f"{time.perf_counter() - start:.0f} s")
    for name in over:
        print(f"BEYOND {BOUND:.0e}: {name}")
    if options.output is not None:
        write_result(options.output, {"steps": STEPS, "bound": BOUND, "pairs": PAIRS, **tables})
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
