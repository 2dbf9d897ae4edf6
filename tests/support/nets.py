"""A small network of any function between its layers, and the oracle on it: for what models do, not what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss

from . import compare, state
from .models import Layers
from .oracle import judge


def views(pairs: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weak = torch.randn(pairs, 5, generator=generator, dtype=torch.float64)
    strong = weak + torch.randn(pairs, 5, generator=generator, dtype=torch.float64)
    return weak.to(dtype), strong.to(dtype), torch.arange(pairs) % 3


class Net(Layers):
    """A function of a stem, two vectors, a head, and layers of one's own."""

    def __init__(self, function: Callable[..., Tensor] | None = None, **layers: nn.Module) -> None:
        function = function or (lambda net, x: torch.tanh(net.stem(x)))
        super().__init__(function, stem=nn.Linear(5, 6), head=nn.Linear(6, 3), **layers)
        self.gain, self.shift = nn.Parameter(0.5 + torch.rand(6)), nn.Parameter(torch.randn(6))

    def forward(self, *inputs: Any) -> Tensor:
        return self.head(super().forward(*inputs))


def net(function: Callable[..., Tensor] | None = None, *, seed: int = 0, **layers: nn.Module) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(function, **layers).double()


def assert_exact(model: nn.Module, engine: str, reference: nn.Module | None = None, **options: Any) -> None:
    """Against the oracle on `reference`, a model of the same function and parameters; nothing is left behind."""
    if reference is not None:
        reference.load_state_dict(model.state_dict())
    before = state.snapshot(model)
    verdict = judge(model if reference is None else reference, *views())
    gc = GradientConsistencyLoss(model, engine=engine, **options)
    compare.assert_exact(gc, views(), verdict)
    assert compare.cosine_error(gc.measure(*views()).cosine, verdict.cosine) <= 1e-10
    assert state.differences(before, state.snapshot(model)) == []
