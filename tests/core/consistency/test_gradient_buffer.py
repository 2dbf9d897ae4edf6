"""Sums over chunks where autograd gives several parameters the same memory, or one that overlaps itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss
from support import compare
from support.oracle import judge
from support.whole_models import WHOLE_CASES, installed, needs

WHOLE = [
    name for name in ("torchvision/vit", "timm/vit_gap_qknorm", "language_model")
    if not (needs(name) and installed(needs(name)))
]  # fmt: skip


class Shared(nn.Module):
    """An encoder, and before or behind it parameters `a` and `b` whose derivatives lie in one piece of memory."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.encoder, self.kind = nn.Linear(4, 6), kind
        shapes = {"merged": ((3, 6), (3, 6)), "token": ((1, 1, 4), (1, 2, 4)), "sum": ((6,), (1,))}[kind]
        self.a, self.b = (nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "token":  # as vision transformers begin
            x = torch.cat([self.a.expand(len(x), -1, -1), x.unsqueeze(1)], 1) + self.b
        h = torch.tanh(self.encoder(x))
        if self.kind == "merged":  # as low-rank adapters are
            return F.linear(h, self.a + self.b)
        if self.kind == "token":
            return self.head(h.mean(1))
        return self.head(h) * self.a.sum() + self.b


@pytest.mark.parametrize("stop", [None, "weak"])
@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
@pytest.mark.parametrize("kind", ["merged", "token", "sum"])
def test_chunks_add_up(kind: str, engine: str, stop: Any) -> None:
    """Only the encoder is compared: the other parameters get their gradient through it alone."""
    torch.manual_seed(0)
    model = Shared(kind).double()
    weak, strong = torch.randn(2, 4, 4).double()
    target = torch.arange(4) % 3
    gc = GradientConsistencyLoss(model, encoder=model.encoder, engine=engine, stop_gradient=stop, chunk_size=1)
    verdict = judge(model, weak, strong, target, compared=lambda name: name.startswith("encoder"), stop_gradient=stop)
    compare.assert_exact(gc, (weak, strong, target), verdict)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_get_the_gradient_of_the_graph(name: str) -> None:
    """The later half of the parameters is compared, a sample at a time, and one view is constant."""
    problem = WHOLE_CASES[name].problem(pairs=3)
    names = [each for each, p in problem.model.named_parameters() if p.requires_grad]
    found = []
    for fused in (True, False):
        gc = GradientConsistencyLoss(
            problem.model, encoder=lambda each: each in names[len(names) // 2 :], engine="loop", stop_gradient="weak",
            chunk_size=1, fused=fused,
        )  # fmt: skip
        found.append(compare.gradient_of(gc(*problem.views), problem.model))
    assert compare.relative(*found) <= 1e-10
