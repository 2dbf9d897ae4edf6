"""Does a long sum lose digits? Errors against float64 as the number of compared parameters grows (N9).

    python tests/slow/summation.py             # 1e3 to 1e7 parameters; writes benchmarks/results/summation.json
    python tests/slow/summation.py --quick     # 1e3 to 1e5; nothing is written

Per-sample gradients of P entries, in float32, two views of two pairs: a bare parameter (the gradient is formed) and a
linear layer with P weights whose inputs are long (products of inputs and of output gradients). Entries are random, or
all positive, where a running sum in float32 stalls. Reference: the same model in float64, by the loop. The exit status
is 1 if a cosine is off by more than 2e-6, a tenth of the bound for float32.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/shared"))
from environment import write_result

from gradconsist import GradientConsistencyLoss

BOUND = 2e-6


class Product(nn.Module):
    """x * p^2: its gradient, summed over entries, is 2 x p."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """The vectors, scaled."""
        return x * self.p.square()


def total(output: Tensor, target: Tensor) -> Tensor:
    return output.sum(1)


def measure(kind: str, size: int, positive: bool, engine: str) -> dict[str, Any]:
    """One row: cosine and norm of one engine, relative to float64."""
    torch.manual_seed(size)
    width = size if kind == "bare parameter" else size // 10
    model: nn.Module = Product(size) if kind == "bare parameter" else nn.Linear(width, 10, bias=False)
    weak = torch.randn(2, width)
    strong = weak + 0.5 * torch.randn(2, width)
    if positive:
        weak, strong = weak.abs(), strong.abs()
    if kind != "bare parameter":
        weak, strong = weak / width**0.5, strong / width**0.5
    target = torch.tensor([0, 1])
    options: dict[str, Any] = {"loss_fn": total} if kind == "bare parameter" else {}
    found = GradientConsistencyLoss(model, engine=engine, **options).measure(weak, strong, target)
    double = copy.deepcopy(model).double()
    exact = GradientConsistencyLoss(double, engine="loop", **options).measure(weak.double(), strong.double(), target)
    return {
        "layer": kind,
        "entries": "positive" if positive else "random",
        "engine": engine,
        "parameters": size,
        "cosine_error": float((found.cosine.double() - exact.cosine).abs().max()),
        "norm_error": float((found.norm_weak.double() / exact.norm_weak - 1).abs().max()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 1e5 parameters; nothing is written")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "summation.json")
    options = parser.parse_args()
    rows = []
    for kind in ("bare parameter", "linear layer"):
        for positive in (False, True):
            for engine in ("loop", "vmap", "ghost"):
                for power in range(3, 6 if options.quick else 8):
                    row = measure(kind, 10**power, positive, engine)
                    rows.append(row)
                    print(
                        f"{kind:<15} {row['entries']:<9} {engine:<6} P = 1e{power}   cosine {row['cosine_error']:.1e}"
                        f"   norm {row['norm_error']:.1e}",
                        flush=True,
                    )
    worst = max(row["cosine_error"] for row in rows)
    print(f"worst cosine error {worst:.1e}, bound {BOUND:.0e}")
    if not options.quick:
        write_result(options.output, {"setting": {"dtype": "float32", "bound": BOUND}, "worst": worst, "rows": rows})
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
