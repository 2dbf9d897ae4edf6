"""GradientNormPenalty against a float64 loop over samples, and as a term."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GGCRWrapper, SSLBatch
from gradconsist.errors import ConfigError, GradModeError
from gradconsist.methods import FixMatch
from gradconsist.regularizers import GradientNormPenalty
from support import compare
from support.oracle import Judge
from support.zoo import CASES, Problem


def by_definition(p: Problem, weight: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
    """1/B sum of weight (|g_w|^2 + |g_s|^2) / 2 and its parameter gradient, one sample at a time."""
    judge: Judge = p.judge(weight, **options)
    terms = []
    for i, factor in enumerate(judge.weight):
        squares = []
        for view, name in enumerate(("weak", "strong")):
            g = judge._sample_gradient(view, i)
            squares.append((g.detach() if judge.stop_gradient == name else g).square().sum())
        terms.append(factor * (squares[0] + squares[1]) / 2)
    loss = torch.stack(terms).sum() / judge.size
    parts = torch.autograd.grad(loss, list(judge.trainable.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([part.reshape(-1) for part in parts])


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])
@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_train"])
def test_value_and_gradient(name: str, fused: bool, engine: str) -> None:
    p, weight = CASES[name].problem(), torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    loss, gradient = by_definition(p, weight)
    penalty = GradientNormPenalty(p.model, encoder=p.case.encoder, engine=engine, fused=fused, chunk_size=2)
    found = penalty(*p.views, weight)
    torch.testing.assert_close(found.detach(), loss, rtol=1e-10, atol=0.0)
    assert compare.relative(compare.gradient_of(found, p.model), gradient) <= 1e-8


@pytest.mark.parametrize("view", ["weak", "strong"])
def test_a_constant_view_has_no_derivative(view: str) -> None:
    p = CASES["mlp"].problem()
    loss, gradient = by_definition(p, stop_gradient=view)
    found = GradientNormPenalty(p.model, stop_gradient=view)(*p.views)
    torch.testing.assert_close(found.detach(), loss, rtol=1e-10, atol=0.0)
    assert compare.relative(compare.gradient_of(found, p.model), gradient) <= 1e-8


def test_degenerate_pairs_are_penalised_and_counted() -> None:
    p = CASES["mlp"].problem()
    loss, gradient = by_definition(p)
    penalty = GradientNormPenalty(p.model, min_norm=1e6)
    found = penalty(*p.views)
    torch.testing.assert_close(found.detach(), loss, rtol=1e-10, atol=0.0)
    assert compare.relative(compare.gradient_of(found, p.model), gradient) <= 1e-8
    assert penalty.last is not None
    assert bool(penalty.last.degenerate.all())
    assert bool(penalty.last.cosine.isnan().all())


def test_a_zero_gradient_has_a_zero_derivative() -> None:
    """Where the cosine's derivative has no bound: a target that is the view's own prediction."""
    p = CASES["mlp"].problem(dtype=torch.float32)
    target = p.model(p.weak).softmax(1).detach()
    loss = GradientNormPenalty(p.model)(p.weak, p.weak, target)
    assert float(loss.detach()) == 0.0
    assert bool((compare.gradient_of(loss, p.model) == 0).all())


def test_subsets_are_unbiased() -> None:
    p = CASES["mlp"].problem()
    exact = float(GradientNormPenalty(p.model)(*p.views).detach())
    penalty = GradientNormPenalty(p.model, max_pairs=4)
    values = torch.tensor([float(penalty(*p.views).detach()) for _ in range(80)])
    assert abs(float(values.mean()) - exact) <= 4 * float(values.std()) / 80**0.5


def test_float16_autocast_neither_under_nor_overflows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 10))
    weak = torch.randn(16, 256)
    strong, target = weak + 0.5 * torch.randn(16, 256), model(weak).argmax(1)
    exact = compare.gradient_of(GradientNormPenalty(model)(weak, strong, target), model)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = GradientNormPenalty(model)(weak, strong, target)
    assert compare.relative(compare.gradient_of(loss, model), exact) <= 5e-3


def test_the_wrapper_takes_it_in_place_of_the_cosine() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    penalty = GradientNormPenalty(model, encoder=model[0])
    wrapper = GGCRWrapper(FixMatch(model, threshold=0.3), penalty, weight=0.5, warmup_steps=0)
    u = torch.randn(6, 4)
    out = wrapper(SSLBatch(torch.randn(2, 4), torch.tensor([0, 1]), u, u + 0.1))
    assert out.pair is not None
    alone = penalty(out.pair.weak, out.pair.strong, out.pair.target, out.pair.weight)
    torch.testing.assert_close(out.logs["ggcr_loss"], alone.detach())
    assert float(alone.detach()) > 0


def test_refusals_name_it() -> None:
    p = CASES["mlp"].problem()
    with pytest.raises(ConfigError, match=r"`engine` is 'gost'.*Did you mean 'ghost'"):
        GradientNormPenalty(p.model, engine="gost")
    with torch.no_grad(), pytest.raises(GradModeError, match="GradientNormPenalty was called under no_grad"):
        GradientNormPenalty(p.model)(*p.views)
    assert repr(GradientNormPenalty(p.model)).startswith("GradientNormPenalty(")
