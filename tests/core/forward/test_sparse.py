"""Embeddings with sparse gradients: what reaches the parameter is the dense gradient, in the form that torch's has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist.diagnostics import verify
from gradconsist.methods import FixMatch
from gradconsist.regularizers import GradientNormPenalty, JacobianPenalty
from support import compare
from support.oracle import Judge

WORDS = 12


class Words(nn.Module):
    """Of the 12 words the last are never used, and 0 is padding. The table may have another use, seen or hidden."""

    def __init__(self, *, sparse: bool, tied: str = "", norm: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 5, padding_idx=0, sparse=sparse)
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.head = nn.Linear(5, 3)
        self.tied = tied
        if tied == "module":
            self.out = nn.Linear(5, WORDS, bias=False)
            self.out.weight = self.words.weight

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        z = self.words(x).sum(1) if scale is None else (self.words(x) * scale[..., None]).sum(1)
        z = torch.tanh(self.norm(z))
        y = self.head(z)
        if self.tied == "module":
            y = y + self.out(z)[:, 1:4]
        if self.tied == "function":
            y = y + F.linear(z, self.words.weight)[:, 1:4]
        return y


def build(**options: Any) -> Words:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Words(**options).double()


def views() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weak = torch.randint(WORDS - 3, (5, 4), generator=generator)
    return weak, weak.roll(1, 0).where(torch.rand(5, 4, generator=generator) < 0.4, weak), torch.arange(5) % 3


def gradients(loss: Callable[[Words], Tensor], calls: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    """Of the words, by a model with `sparse=False` and one with True; all other gradients must be the same."""
    pair = [build(sparse=sparse, **options) for sparse in (False, True)]
    for model in pair:
        for _ in range(calls):
            loss(model).backward()
    named = [{name: p.grad for name, p in model.named_parameters()} for model in pair]
    dense, found = (each.pop("words.weight") for each in named)
    for name, one in named[0].items():
        other = named[1][name]
        assert one is other is None or torch.equal(one, other)
    return dense, found


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "through_statistics"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_the_gradient_is_the_dense_one_in_sparse_form(engine: str, fused: bool, norm: bool) -> None:
    weak, strong, target = views()
    options: dict[str, Any] = {"engine": engine, "fused": fused, "through_statistics": norm}
    loss = lambda model: GradientConsistencyLoss(model, **options)(weak, strong, target)  # noqa: E731
    dense, found = gradients(loss, norm=norm)
    assert found.is_sparse
    assert torch.equal(found.to_dense(), dense)
    rows = dense.abs().sum(1).nonzero().squeeze(1)
    assert torch.equal(found.coalesce().indices()[0], rows)
    assert 0 < len(rows) < WORDS - 3  # neither the padding nor words that no view has
    if not norm:  # and the dense one is right
        verdict = Judge(build(sparse=False), weak, strong, target).verdict()
        assert compare.relative(compare.gradient_of(loss(model := build(sparse=False)), model), verdict.flat) <= 1e-8
    accumulated = gradients(loss, calls=2, norm=norm)[1]
    assert accumulated.is_sparse
    assert torch.equal(accumulated.to_dense(), 2 * dense)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", ["module", "function"])
def test_a_weight_with_another_use_has_a_dense_gradient(tied: str, fused: bool) -> None:
    """As in torch; also in the first call, which finds the use that no module tells."""
    dense, found = gradients(lambda model: GradientConsistencyLoss(model, fused=fused)(*views()), tied=tied)
    assert found.layout == torch.strided
    assert torch.equal(found, dense)


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_to_compare_is_a_sparse_zero(fused: bool) -> None:
    zeros = torch.zeros(5)
    _, found = gradients(lambda model: GradientConsistencyLoss(model, fused=fused)(*views(), zeros))
    assert found.is_sparse
    assert not found.to_dense().any()


def _jacobian(model: Words) -> Tensor:
    return JacobianPenalty(model)((views()[0], torch.linspace(0.5, 1.5, 20, dtype=torch.float64).view(5, 4)))


@pytest.mark.parametrize("tied", ["", "function"])
@pytest.mark.parametrize("penalty", [lambda model: GradientNormPenalty(model)(*views()), _jacobian])
def test_penalties(penalty: Callable[[Words], Tensor], tied: str) -> None:
    dense, found = gradients(penalty, tied=tied)
    assert found.is_sparse == (not tied)
    assert dense.any()
    assert torch.equal(found.to_dense(), dense)


@pytest.mark.parametrize("fused", [True, False])
def test_training_with_a_scaler_and_an_optimizer_that_takes_sparse_gradients_only(fused: bool) -> None:
    """Beside a method, whose own gradient is sparse: the same words as with a dense table, step by step."""
    tables = []
    for sparse in (False, True):
        model = build(sparse=sparse).float()
        wrapper = GGCRWrapper(
            FixMatch(model, threshold=0.0), GradientConsistencyLoss(model, fused=fused), warmup_steps=0
        )
        # Rows without a gradient stay as they are in both: SGD without momentum, for a table to compare with.
        optimizers = [torch.optim.SGD([model.words.weight], lr=0.5), torch.optim.SGD(model.head.parameters(), lr=0.5)]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        weak, strong, target = views()
        for _ in range(3):
            scaler.scale(wrapper(SSLBatch(weak, target, weak, strong)).loss).backward()
            assert model.words.weight.grad.is_sparse == sparse
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        tables.append(model.words.weight.detach().clone())
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-7)
    wrapper(SSLBatch(weak, target, weak, strong)).loss.backward()
    torch.optim.SparseAdam([model.words.weight]).step()
    assert not torch.equal(model.words.weight, tables[1])


def test_verify_takes_it_and_a_third_derivative_is_there() -> None:
    weak, strong, target = views()
    assert verify(GradientConsistencyLoss(build(sparse=True)), weak, strong, target, directions=2).ok
    found = []
    for sparse in (False, True):
        model = build(sparse=sparse)
        loss = GradientConsistencyLoss(model, fused=False)(weak, strong, target)
        (gradient,) = torch.autograd.grad(loss, model.words.weight, create_graph=True)
        found.append(torch.autograd.grad(gradient.to_dense().square().sum(), model.head.weight)[0])
    assert torch.equal(*found)
