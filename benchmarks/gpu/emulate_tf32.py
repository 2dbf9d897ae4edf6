"""What TF32 does to the term, emulated on a CPU: inputs of convolutions rounded to 10 bits of mantissa.

python benchmarks/gpu/emulate_tf32.py      # prints errors against float64, a line per network and draw
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "cost")]
from models import spec

from gradconsist import GradientConsistencyLoss

CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward}


class TF32(TorchDispatchMode):
    """Convolutions round their float32 inputs, to even, as tensor cores do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in CONVOLUTIONS:
            args = tuple(_rounded(arg) for arg in args)
        return func(*args, **(kwargs or {}))


def _rounded(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def answer(model: nn.Module, views: tuple[Tensor, ...], *, tf32: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines, and the gradient of the term as a vector."""
    model = copy.deepcopy(model)
    loss = GradientConsistencyLoss(model)
    with TF32() if tf32 else nullcontext():
        loss(*views).backward()
    assert loss.last is not None
    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    return loss.last.cosine.double(), gradient


def main() -> None:
    for name in ("wrn-10-1", "wrn-28-2"):
        for seed in range(3):
            torch.manual_seed(seed)
            model, weak = spec(name).build(), torch.randn(8, 3, 32, 32)
            views = weak, weak + 0.3 * torch.randn_like(weak), torch.randint(10, (8,))
            cosine, gradient = answer(model.double(), (weak.double(), views[1].double(), views[2]))
            model.float()
            for label, tf32 in (("float32", False), ("TF32", True)):
                found = answer(model, views, tf32=tf32)
                error = float((found[1] - gradient).norm() / gradient.norm())
                print(
                    f"{name} {seed} {label}: cosine {float((found[0] - cosine).abs().max()):.1e}, gradient {error:.1e}"
                )


if __name__ == "__main__":
    main()
