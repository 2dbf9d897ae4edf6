"""BatchNorm with constant statistics, and dropout: what SPEC decides, in every engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradconsist import GradientConsistencyLoss
from gradconsist.errors import GradConsistError
from support import compare
from support.oracle import judge
from support.zoo import CASES

ENGINES = pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
NORMED = ["cnn_batchnorm_train", "cnn_batchnorm_eval", "cnn_batchnorm_mixed", "cnn_batchnorm_twice", "wrn_slice",
          "cnn_batchnorm_fused_activation", "cnn_batchnorm_functional"]  # fmt: skip


@ENGINES
@pytest.mark.parametrize("batchnorm", ["auto", "batch", "running"])
@pytest.mark.parametrize("name", NORMED)
def test_batchnorm_options(name: str, batchnorm: str, engine: str) -> None:
    """Both forms in turn: an option meets each of them in every engine. Statistics are joint, over all chunks too."""
    fused = (NORMED.index(name) + len(batchnorm) + len(engine)) % 2 == 0
    p, verdict = CASES[name].problem(), CASES[name].verdict(batchnorm=batchnorm)
    gc = GradientConsistencyLoss(p.model, engine=engine, batchnorm=batchnorm, fused=fused, chunk_size=2)
    compare.assert_exact(gc, p.views, verdict)


def test_the_options_differ() -> None:
    """So that the test above can tell them apart."""
    p = CASES["cnn_batchnorm_train"].problem()
    batch, running = (p.judge(batchnorm=option).verdict().flat for option in ("batch", "running"))
    assert compare.relative(batch, running) > 1e-2


@ENGINES
def test_weight_zero_pairs_count_in_the_statistics(engine: str) -> None:
    """Their contents move the result with batch statistics, and do not with running ones."""
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    for name, moves in (("cnn_batchnorm_train", True), ("cnn_batchnorm_eval", False)):
        p = CASES[name].problem()
        gc = GradientConsistencyLoss(p.model, engine=engine)
        first = compare.gradient_of(gc(*p.views, weight), p.model)
        p.weak[2] += 3.0
        second = compare.gradient_of(gc(*p.views, weight), p.model)
        assert compare.relative(second, p.judge(weight).verdict().flat) <= 1e-8
        assert (compare.relative(second, first) > 1e-3) == moves


def test_running_statistics_that_do_not_exist_are_refused() -> None:
    p = CASES["cnn_batchnorm_no_running"].problem()
    with pytest.raises(GradConsistError, match="running"):
        GradientConsistencyLoss(p.model, batchnorm="running")(*p.views)


def test_observed_statistics_need_the_wrapper() -> None:
    p = CASES["cnn_batchnorm_train"].problem()
    with pytest.raises(GradConsistError, match="GGCRWrapper"):
        GradientConsistencyLoss(p.model, batchnorm="observed")(*p.views)


@ENGINES
def test_one_pair_with_one_pixel_has_a_definition(engine: str) -> None:
    """torch refuses batch statistics of a single value; the joint statistics of two views are two values."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    weak, strong = torch.randn(2, 1, 4).double()
    verdict = judge(model, weak, strong, torch.tensor([1]))
    gc = GradientConsistencyLoss(model, engine=engine)
    loss = gc(weak, strong, torch.tensor([1]))
    assert compare.relative(compare.gradient_of(loss, model), verdict.flat) <= 1e-8


# That it is off by default: the rows with dropout in test_exactness and test_ghost, whose oracle has none.
@ENGINES
@pytest.mark.parametrize("name", ["dropout", "dropout_functional", "dropout2d"])
def test_dropout_on_has_independent_masks(name: str, engine: str) -> None:
    p = CASES[name].problem()
    gc = GradientConsistencyLoss(p.model, engine=engine, dropout="on")
    state = torch.random.get_rng_state()
    first = gc(p.weak, p.weak, p.target)
    assert gc.last.cosine.min() < 0.999, "identical views, one mask for each: the gradients differ"
    second = gc(p.weak, p.weak, p.target)
    assert float(first.detach()) != float(second.detach()), "every call has masks of its own"
    assert torch.equal(torch.random.get_rng_state(), state), "the global stream is not consumed"
    generator = torch.Generator().manual_seed(7)
    third = gc(*p.views, generator=generator)
    flat = compare.gradient_of(third, p.model)
    again = gc(*p.views, generator=torch.Generator().manual_seed(7))
    assert float(third.detach()) == float(again.detach())
    assert torch.equal(flat, compare.gradient_of(again, p.model))
    assert float(third.detach()) != float(gc(*p.views, generator=torch.Generator().manual_seed(8)).detach())


@ENGINES
def test_dropout_on_draws_for_each_sample(engine: str) -> None:
    """The same sample many times: as many masks, in each view, as there are samples."""
    p = CASES["dropout"].problem()
    same = p.weak[:1].expand(12, *p.weak.shape[1:])
    gc = GradientConsistencyLoss(p.model, engine=engine, dropout="on", chunk_size=4)
    gc(same, same, p.target[:1].expand(12))
    assert len(gc.last.cosine.unique()) > 6
    assert len(gc.last.norm_weak.unique()) > 6


def test_dropout_on_agrees_in_distribution() -> None:
    """Mean cosine over 60 draws of masks: the engines within four standard errors of the loop."""
    p = CASES["dropout"].problem()
    means, errors = [], []
    for engine in ("loop", "vmap", "ghost"):
        gc = GradientConsistencyLoss(p.model, engine=engine, dropout="on")
        draws = [
            float(gc.measure(*p.views, generator=torch.Generator().manual_seed(s)).cosine.nanmean()) for s in range(60)
        ]
        sample = torch.tensor(draws)
        means.append(float(sample.mean()))
        errors.append(float(sample.std()) / len(draws) ** 0.5)
    for mean, error in zip(means[1:], errors[1:], strict=True):
        assert abs(means[0] - mean) <= 4 * (errors[0] ** 2 + error**2) ** 0.5
    reference = float(p.judge().verdict().cosine.mean())
    assert abs(means[0] - reference) > 4 * errors[0], "and the masks matter"


def test_dropout_in_eval_mode_stays_off_under_on() -> None:
    p = CASES["dropout"].problem()
    p.model.eval()
    gc = GradientConsistencyLoss(p.model, dropout="on")
    loss = gc(*p.views)
    assert compare.relative(compare.gradient_of(loss, p.model), p.judge().verdict().flat) <= 1e-8
