"""Every model of the zoo under the loop and vmap, with the options in turn, against the float64 oracle."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn

from gradconsist import GradientConsistencyLoss
from gradconsist.errors import UnsupportedModuleError
from support import compare
from support.models import Layers
from support.oracle import Judge
from support.zoo import CASES, PAIRS, Problem, weight_norm_by_hand

DOUBLE, SINGLE = torch.float64, torch.float32
CHUNKS = (1, 3, None, "auto")
WEIGHT = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.25], dtype=torch.float64)
assert len(WEIGHT) == PAIRS


def _loss(problem: Problem, **options: object) -> GradientConsistencyLoss:
    case = problem.case
    return GradientConsistencyLoss(problem.model, encoder=case.encoder, loss_fn=case.loss_fn, **options)


def _rows(name: str, engine: str) -> list[tuple[torch.dtype, bool, Any]]:
    """(dtype, fused, chunk_size) of the calls that one model gets under one engine: the other one has the other form.

    Every row meets many models under each engine; float32 meets each model under one of the two.
    """
    place = list(CASES).index(name) + (engine == "vmap")
    rows: list[tuple[torch.dtype, bool, Any]] = [(DOUBLE, place % 2 == 0, CHUNKS[place // 2 % 4])]
    return [*rows, (SINGLE, place % 4 == 1, 3 if place % 3 else 1)] if place % 2 else rows


@pytest.mark.parametrize("engine", ["loop", "vmap"])  # the ghost engine and the defaults: test_ghost.py
@pytest.mark.parametrize("name", CASES)
def test_engines_agree_with_the_oracle(name: str, engine: str) -> None:
    for dtype, fused, chunk_size in _rows(name, engine):
        problem = CASES[name].problem(dtype=dtype)
        gc = _loss(problem, engine=engine, fused=fused, chunk_size=chunk_size)
        if getattr(CASES[name], engine, "exact") == "refused":
            with pytest.raises(UnsupportedModuleError, match="loop"):
                gc(*problem.views)
            continue
        verdict = CASES[name].verdict(dtype=dtype)
        compare.assert_exact(gc, problem.views, verdict)
        if dtype == DOUBLE and fused:
            compare.assert_measures(gc.measure(*problem.views), verdict)


WEIGHTED = ["mlp", "cnn_batchnorm_train", "vit", "tied_embedding"]


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_go_inside(name: str, engine: str) -> None:
    """Zero and soft weights; pairs of weight 0 count in the statistics and in the denominator."""
    verdict, place = CASES[name].verdict(WEIGHT), WEIGHTED.index(name)
    for fused, chunk_size in ((True, (1, 3, None)[place % 3]), (False, (3, None, 1)[place % 3])):
        problem = CASES[name].problem()
        gc = _loss(problem, engine=engine, fused=fused, chunk_size=chunk_size)
        loss = gc(*problem.views, WEIGHT)
        gradient = compare.gradient_of(loss, problem.model)
        assert float((loss.detach() - verdict.loss).abs()) <= 1e-10
        assert compare.relative(gradient, verdict.flat) <= 1e-8
        compared = gc.last.compared
        assert compared.tolist() == (WEIGHT > 0).tolist()
        assert compare.cosine_error(gc.last.cosine[compared], verdict.cosine[compared]) <= 1e-10
        assert gc.last.cosine[~compared].isnan().all()
        assert gc.last.norm_weak[~compared].isnan().all()
        assert gc.last.norm_strong[~compared].isnan().all()


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_what_is_compared_and_what_is_differentiated(engine: str) -> None:
    """E is what the user names; the derivative goes to every trainable parameter, the head included."""
    for encoder, compared in (
        (lambda m: m[0], lambda n: n.startswith("0.")),
        (lambda m: [m[0], m[2]], lambda n: n.startswith(("0.", "2."))),
        (lambda m: (m[2],), lambda n: n.startswith("2.")),
        (lambda m: lambda n: n.endswith("weight"), lambda n: n.endswith("weight")),
    ):
        problem = CASES["mlp"].problem()
        verdict = problem.judge(compared=compared).verdict()
        gc = GradientConsistencyLoss(problem.model, encoder=encoder(problem.model), engine=engine)
        compare.assert_exact(gc, problem.views, verdict)
        assert float(verdict.gradient["4.weight"].norm()) > 1e-3


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_frozen_parameters_are_not_compared(engine: str) -> None:
    """An encoder that holds frozen parameters compares its trainable ones; the frozen get no gradient."""
    problem = CASES["frozen_subset"].problem()
    verdict = problem.judge(compared=lambda n: n.startswith(("0.", "2."))).verdict()
    gc = GradientConsistencyLoss(problem.model, encoder=[problem.model[0], problem.model[2]], engine=engine)
    gc(*problem.views).backward()
    assert problem.model[0].weight.grad is None
    assert problem.model[2].weight.grad is None
    problem.model.zero_grad()
    compare.assert_exact(gc, problem.views, verdict)


def test_parameters_frozen_after_construction() -> None:
    """The selection is that of the call: a schedule may freeze and unfreeze layers."""
    problem = CASES["mlp"].problem()
    gc = GradientConsistencyLoss(problem.model)
    problem.model[0].requires_grad_(False)
    verdict = problem.judge().verdict()
    gradient = compare.gradient_of(gc(*problem.views), problem.model)
    assert compare.relative(gradient, verdict.flat) <= 1e-8
    problem.model[0].requires_grad_(True)
    gradient = compare.gradient_of(gc(*problem.views), problem.model)
    assert compare.relative(gradient, problem.judge().verdict().flat) <= 1e-8


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_many_pairs_in_odd_chunks(engine: str) -> None:
    """A last chunk that is short, one larger than the batch, and a batch of one pair."""
    for pairs, chunk_size in ((7, 3), (7, 2), (7, 7), (7, 50), (1, 1), (1, None), (2, "auto")):
        problem = CASES["cnn_batchnorm_train"].problem(pairs=pairs)
        gc = GradientConsistencyLoss(problem.model, engine=engine, chunk_size=chunk_size)
        compare.assert_exact(gc, problem.views, problem.judge().verdict())


def _difference() -> nn.Module:
    """Two inputs of one shape that must not be mixed up; a BatchNorm, so that statistics are taken from both views."""
    inner = lambda m, one, other: torch.tanh(m.norm(m.plus(one) - 2 * m.minus(other)))  # noqa: E731
    layers = {"plus": nn.Linear(4, 5), "minus": nn.Linear(4, 5), "norm": nn.BatchNorm1d(5), "head": nn.Linear(5, 3)}
    return Layers(lambda m, **views: m.head(inner(m, **views)), **layers)


@pytest.mark.parametrize("stop", [None, "strong"])
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_views_are_paired_by_key_in_whatever_order_they_were_built(engine: str, stop: str | None) -> None:
    model = _difference().double()
    weak, strong = ({key: torch.randn(4, 4).double() for key in ("one", "other")} for _ in "ws")
    target = torch.tensor([0, 1, 2, 0])
    verdict = Judge(model, weak, strong, target, stop_gradient=stop).verdict()
    gc = GradientConsistencyLoss(model, engine=engine, stop_gradient=stop, chunk_size=3)
    compare.assert_exact(gc, (weak, {key: strong[key] for key in ("other", "one")}, target), verdict)


def test_old_style_weight_norm() -> None:
    """torch.nn.utils.weight_norm (a hook): right by the formula, or refused by name -- never torch's wrong value."""
    problem = CASES["mlp"].problem()
    with pytest.warns(Warning, match="weight_norm"):
        torch.nn.utils.weight_norm(problem.model[0])
    try:
        gradient = compare.gradient_of(GradientConsistencyLoss(problem.model)(*problem.views), problem.model)
    except UnsupportedModuleError as error:
        assert "weight_norm" in str(error)  # noqa: PT017
        return
    plain = CASES["mlp"].problem()
    torch.nn.utils.parametrizations.weight_norm(plain.model[0])
    by_hand = plain.judge(reference=weight_norm_by_hand).verdict().gradient
    names = {"0.weight_g": "0.parametrizations.weight.original0", "0.weight_v": "0.parametrizations.weight.original1"}
    expected = [by_hand[names.get(n, n)].reshape(-1) for n, _ in problem.model.named_parameters()]
    assert compare.relative(gradient, torch.cat(expected)) <= 1e-8


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
@pytest.mark.parametrize("name", [name for name in CASES if "memory" in name or "history" in name or "_train" in name])
def test_what_a_model_remembers_stays_as_it_was(name: str, engine: str) -> None:
    problem = CASES[name].problem()
    modules = list(problem.model.modules())
    before = [copy.deepcopy({k: v for k, v in vars(module).items() if k != "_modules"}) for module in modules]
    with contextlib.suppress(UnsupportedModuleError):
        _loss(problem, engine=engine)(*problem.views)
    for module, attributes in zip(modules, before, strict=True):
        now = {k: v for k, v in vars(module).items() if k != "_modules"}
        assert now.keys() == attributes.keys()
        for key in ("_buffers", "seen", "before", "calls"):
            assert str(now.get(key)) == str(attributes.get(key)), key
