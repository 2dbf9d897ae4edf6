"""`RandomProjection`: its matrices, its options, and its state in loss and wrapper."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from gradconsist import GradientConsistencyLoss, RandomProjection
from gradconsist.engines import GradProducts, Problem
from gradconsist.engines.projection import KINDS, Projector
from gradconsist.errors import ConfigError, StateError
from support import compare
from support.zoo import CASES

KIND = pytest.mark.parametrize("kind", KINDS)
SHAPES = [(4, 5), (3, 2, 2), ()]  # for k = 3 "kronecker" projects the first weight, and not the narrow one


@KIND
def test_inner_products_are_unbiased(kind: Any) -> None:
    """The mean over 2,000 consecutive seeds lies within four standard errors of the exact product, entry by entry."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 33, generator=generator, dtype=torch.float64)
    matrices = torch.stack([RandomProjection(3, kind, seed=seed).matrix(SHAPES) for seed in range(2000)])
    for left, right in ((a, b), (a, a)):
        values = ((matrices @ left) * (matrices @ right)).sum(1)
        error = float(values.mean() - left @ right)
        assert values.std() > 0.1
        assert abs(error) <= 4 * float(values.std()) / 2000**0.5
    # E[P^T P] = I as a whole, and so for every a and b: 33^2 entries, each with a standard error of about 1/sqrt(6000)
    second = (matrices.transpose(1, 2) @ matrices).mean(0) - torch.eye(33, dtype=torch.float64)
    assert float(second.abs().max()) <= 0.08


def test_the_variance_of_the_gaussian_kind_is_the_documented_one() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    values = []
    for seed in range(2000):
        p = RandomProjection(4, "gaussian", seed=seed).matrix([(6,)])
        values.append((p @ a) @ (p @ b))
    expected = (a.square().sum() * b.square().sum() + (a @ b) ** 2) / 4
    assert float(torch.stack(values).var()) == pytest.approx(float(expected), rel=0.15)


def test_the_cosine_has_the_documented_bias_and_deviation() -> None:
    """Every two columns of a long P are a draw of their own."""
    k, cos = 8, 0.6
    p = RandomProjection(k, "gaussian", seed=3).matrix([(80_000,)]).view(k, -1, 2)
    a, b = p[..., 0], cos * p[..., 0] + (1 - cos**2) ** 0.5 * p[..., 1]
    values = (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))
    assert float(values.mean()) - cos == pytest.approx(-cos * (1 - cos**2) / (2 * k), rel=0.2)
    assert float(values.std()) == pytest.approx((1 - cos**2) / k**0.5, rel=0.15)


def test_the_variance_of_the_kronecker_kind_is_within_the_documented_bound() -> None:
    """For rank one and for high rank, which the bound tells apart."""
    generator = torch.Generator().manual_seed(2)
    k = 4
    for rank in (1, 12):
        g = torch.randn(12, rank, generator=generator).double() @ torch.randn(rank, 12, generator=generator).double()
        g = g / g.norm()
        squares = []
        for seed in range(800):
            p = RandomProjection(k, seed=seed).matrix([(12, 12)])
            squares.append((p @ g.flatten()).square().sum())
        variance, mean = float(torch.stack(squares).var()), float(torch.stack(squares).mean())
        bound = (4 / k + 2 / k**2) * float((g @ g.T).square().sum()) + 2 / k**2
        assert mean == pytest.approx(1.0, abs=4 * (variance / 800) ** 0.5)
        assert 0.5 * bound <= variance <= 1.1 * bound


@KIND
def test_the_matrix_is_that_of_seed_draw_and_position_alone(kind: Any) -> None:
    one, same = RandomProjection(3, kind, seed=5), RandomProjection(3, kind, seed=5)
    assert torch.equal(one.matrix(SHAPES), same.matrix(SHAPES))
    assert not torch.equal(one.matrix(SHAPES), RandomProjection(3, kind, seed=6).matrix(SHAPES))
    assert torch.equal(one.matrix(SHAPES), one.matrix(SHAPES, call=7))  # nothing is drawn anew by default
    every = RandomProjection(3, kind, seed=5, resample_every=2)
    draws = [every.matrix(SHAPES, call=call) for call in range(5)]
    assert torch.equal(draws[0], one.matrix(SHAPES))
    assert [torch.equal(a, b) for a, b in itertools.pairwise(draws)] == [True, False, True, False]
    # A parameter's part is that of its position, whatever comes before and after.
    assert torch.equal(one.matrix([(20,), (3, 2, 2), ()])[-12:, 20:32], one.matrix(SHAPES)[-12:, 20:32])


def test_the_gaussian_kind_draws_from_a_generator_of_its_own() -> None:
    """Neither torch's global generators nor the default device and dtype decide, and none of them is touched."""
    projection, before = RandomProjection(3, "gaussian", seed=5), torch.get_rng_state()
    matrix = projection.matrix(SHAPES)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    with torch.device("meta"):
        assert torch.equal(projection.matrix(SHAPES), matrix)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projecting and lifting in blocks of a few columns is the product with the whole matrix and its transpose."""
    monkeypatch.setattr("gradconsist.engines.projection._BLOCK", 3 * 70)
    projection = RandomProjection(70, "gaussian", seed=3)
    matrix, projector = projection.matrix([(11,)]), projection.projector()
    g, v = torch.randn(2, 11).double().requires_grad_(), torch.randn(2, 70).double().requires_grad_()
    assert [place.stop - place.start for place, _ in projector.blocks(g, 0, 11)] == [3, 3, 3, 2]
    sketch = projector.sketch(g, 0)
    assert torch.allclose(sketch, g @ matrix.T, atol=1e-12)
    (lifted,) = torch.autograd.grad(sketch, g, v, create_graph=True)
    assert torch.allclose(lifted, v @ matrix, atol=1e-12)
    (again,) = torch.autograd.grad(lifted, v, g.detach())
    assert torch.allclose(again, sketch, atol=1e-12)


def test_signs_of_the_kronecker_kind() -> None:
    left, right = RandomProjection(70).projector().factors((400, 90), 0, torch.float64, torch.device("cpu"))
    for factor, size in ((left, 400), (right, 90)):
        assert factor.shape == (70, size)
        assert torch.allclose(factor.abs(), torch.full_like(factor, 70**-0.5))
        assert abs(float(factor.sign().mean())) < 0.05
        assert float((factor.T @ factor - torch.eye(size)).abs().max()) < 0.6  # no two columns alike


def test_which_weights_the_kronecker_kind_projects() -> None:
    projector = RandomProjection(3).projector()
    shrinks = {shape: projector.shrinks(shape) for shape in [(4, 4), (3, 9), (9, 3), (4, 1, 2, 2), (4, 1, 3), (9,), ()]}
    assert [shape for shape, does in shrinks.items() if does] == [(4, 4), (4, 1, 2, 2)]
    assert torch.equal(RandomProjection(4).matrix([(4, 9), (2,)]), torch.eye(38).double())
    left, right = projector.factors((4, 5), 0, torch.float64, torch.device("cpu"))
    g = torch.randn(4, 5).double()
    by_hand = torch.stack([torch.stack([(u[:, None] * g * v[None]).sum() for v in right]) for u in left])
    matrix = RandomProjection(3).matrix([(4, 5)])
    assert torch.allclose((matrix @ g.flatten()).view(3, 3), by_hand)


class _Ignorant:
    """An engine of the user's that knows nothing of projections."""

    def products(self, problem: Problem) -> GradProducts:
        raise NotImplementedError


def test_an_engine_that_would_ignore_the_projection_is_refused() -> None:
    GradientConsistencyLoss(nn.Linear(5, 3), engine=_Ignorant())
    with pytest.raises(ConfigError, match=r"`projection` needs an engine that supports it.*_Ignorant.*`engine='auto'`"):
        GradientConsistencyLoss(nn.Linear(5, 3), engine=_Ignorant(), projection=RandomProjection(2))


def _values(gc: GradientConsistencyLoss, calls: int) -> list[float]:
    problem = CASES["mlp"].problem()
    return [float(gc(*problem.views).detach()) for _ in range(calls)]


def _loss(**options: Any) -> GradientConsistencyLoss:
    return GradientConsistencyLoss(CASES["mlp"].problem().model, projection=RandomProjection(2, **options))


@KIND
def test_resampling_and_measuring(kind: Any) -> None:
    """New matrices every second call; `measure` takes those of the next call and does not count."""
    problem = CASES["mlp"].problem()
    fixed = _values(_loss(kind=kind), 3)
    assert fixed == [fixed[0]] * 3
    assert _values(_loss(kind=kind, resample_every=0), 3) == fixed
    gc = _loss(kind=kind, resample_every=2)
    values = []
    for _ in range(5):
        record = gc.measure(*problem.views)
        values += _values(gc, 1)
        assert torch.allclose(gc.last.cosine, record.cosine, atol=1e-12)
    assert values[0] == fixed[0]
    assert [a == b for a, b in itertools.pairwise(values)] == [True, False, True, False]


def test_a_call_that_fails_does_not_count() -> None:
    gc = _loss(resample_every=1)
    problem = CASES["mlp"].problem()
    with pytest.raises(ValueError, match="class 9"):
        gc(problem.weak, problem.strong, torch.full((5,), 9))
    assert _values(gc, 1) == _values(_loss(resample_every=1), 1)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda gc: pickle.loads(pickle.dumps(gc)), None])
def test_a_resumed_loss_goes_on_with_the_same_matrices(way: Any) -> None:
    whole = _values(_loss(resample_every=2), 7)
    first = _loss(resample_every=2)
    assert _values(first, 3) == whole[:3]
    if way is None:
        second = _loss(resample_every=2)
        second.load_state_dict(first.state_dict())
    else:
        second = way(first)
    assert _values(second, 4) == whole[3:]


def test_a_state_that_does_not_fit_is_refused() -> None:
    plain, projected = GradientConsistencyLoss(nn.Linear(5, 3)), _loss()
    assert set(plain.state_dict()) == {"generator"}
    with pytest.raises(StateError, match=r"holds \['generator'\], expected {'generator': Tensor, 'calls': Tensor}"):
        projected.load_state_dict(plain.state_dict())
    with pytest.raises(StateError, match=r"holds \['calls', 'generator'\], expected {'generator': Tensor}"):
        plain.load_state_dict(projected.state_dict())
    for calls in (torch.tensor(-1), torch.tensor(1.0), torch.tensor([1, 2])):
        with pytest.raises(StateError, match=r"`state\['calls'\]` is .*expected a count"):
            projected.load_state_dict(projected.state_dict() | {"calls": calls})
    assert projected.state_dict()["calls"] == 0


def test_a_projector_is_the_same_in_float32() -> None:
    """Matrices do not depend on the dtype of what they multiply."""
    projector = Projector("gaussian", 3, (17, 0))
    g = torch.randn(2, 40).double()
    assert compare.relative(projector.sketch(g.float(), 0), projector.sketch(g, 0)) <= 1e-6
