"""Nothing of the user's changes: after success, and after an exception at any point."""

from __future__ import annotations

import copy
import gc as garbage
import pickle
import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss
from gradconsist.engines import GhostEngine
from gradconsist.errors import GradConsistError, ModelError
from support import compare, state
from support.nets import Layers
from support.zoo import CASES, Problem

ENGINES = pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])

# Models whose state is easy to disturb: buffers, dropout, attention flags, parametrisations, recurrent networks, hooks.
DELICATE = [
    "cnn_batchnorm_train", "cnn_batchnorm_mixed", "cnn_batchnorm_cumulative", "cnn_batchnorm_fused_activation",
    "cnn_batchnorm_functional", "cnn_batchnorm_twice", "cnn_sync_batchnorm_train", "cnn_instancenorm_tracking",
    "cnn_channels_last", "vit_dropout", "transformer_layer", "transformer_layer_eval", "dropout_functional",
    "weight_norm", "spectral_norm_eval", "frozen_subset", "tied_embedding", "module_with_two_names", "mlp_user_hooks",
    "lstm", "text_dict",
]  # fmt: skip


@pytest.mark.parametrize("engine", ["ghost", "auto"])
def test_a_module_with_two_names_inside_one_that_runs_sample_by_sample(engine: str) -> None:
    """It reads a value as vmap refuses to, so the ghost engine runs it sample by sample."""
    branch = lambda m, x: m.second(m.first(x).tanh()) if torch.ops.aten.item(x.sum()) > -1e9 else x  # noqa: E731
    own = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(5, 6), Layers(branch, first=own, second=own), nn.Linear(6, 3)).double()
    p = Problem(CASES["mlp"], model, *CASES["mlp"].problem().views)
    before, verdict = state.snapshot(p.model), p.judge().verdict()
    gc = GradientConsistencyLoss(model, engine=engine)
    loss = gc(*p.views)
    assert state.differences(before, state.snapshot(p.model)) == []
    compare.assert_agrees(gc.last, loss, compare.gradient_of(loss, model), verdict, dtype=torch.float64)


def _give_gradients(p: Problem) -> None:
    for parameter in p.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for place, name in enumerate(DELICATE) for engine in ("loop", ("vmap", "ghost")[place % 2])],
)
def test_a_successful_call_leaves_no_trace(name: str, engine: str) -> None:
    """Under the loop, and one of the engines that batch; in both forms by turns."""
    fused = (DELICATE.index(name) // 2 + len(engine)) % 2 == 0
    if CASES[name].vmap == "refused" and engine == "vmap":
        engine = "auto"
    p = CASES[name].problem()
    _give_gradients(p)
    before = state.snapshot(p.model)
    loss = GradientConsistencyLoss(p.model, encoder=p.case.encoder, engine=engine, fused=fused, chunk_size=2)
    assert state.differences(before, state.snapshot(p.model)) == [], "after construction"
    value = loss(*p.views)
    assert state.differences(before, state.snapshot(p.model)) == [], "after the call"
    loss.measure(*p.views)
    with torch.no_grad():
        loss.measure(*p.views)
    assert state.differences(before, state.snapshot(p.model)) == [], "after measure"
    value.backward()
    changed = state.differences(before, state.snapshot(p.model))
    assert changed, "backward writes gradients"
    assert all(key.endswith(": grad") for key in changed)
    del loss, value
    assert all(key.endswith(": grad") for key in state.differences(before, state.snapshot(p.model)))


FORMS = {form: GhostEngine(form=form) for form in ("gradient", "gram")}
EVERY: dict[str, Any] = {"loop": "loop", "vmap": "vmap", "ghost": "ghost", **FORMS}


@FUSED
@pytest.mark.parametrize("engine", EVERY.values(), ids=EVERY)
def test_an_exception_in_any_forward_leaves_no_trace(engine: Any, fused: bool) -> None:
    """At each forward in turn, until there is none left to fail: probes, statistics, both views, every chunk.

    Two kinds of exceptions by turns; in the loss function and in derivatives: test_state_checks.
    """
    calls = at = 0

    def explode(layer: Any, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise (KeyError, KeyboardInterrupt)[at % 2]("planted")
        return x

    p = CASES["cnn_batchnorm_train"].problem(pairs=3)
    parts = list(p.model)
    p.model = nn.Sequential(*parts[:3], nn.Dropout(0.3), Layers(explode), *parts[3:]).double()
    _give_gradients(p)
    before = state.snapshot(p.model)
    GradientConsistencyLoss(p.model, engine=engine, fused=fused, chunk_size=2)(*p.views)
    count = calls
    assert count >= 5
    for last in range(1, count + 1):
        calls, at = 0, last
        gc = GradientConsistencyLoss(p.model, engine=engine, fused=fused, chunk_size=2)
        named = r"`model\.4` \(Layers\): KeyError: 'planted'|^planted$"
        with pytest.raises((ModelError, KeyboardInterrupt), match=named):
            gc(*p.views)
        assert state.differences(before, state.snapshot(p.model)) == []
    assert torch.isfinite(gc(*p.views)), "and the loss works afterwards"
    assert state.differences(before, state.snapshot(p.model)) == []


def test_the_random_states_of_torch_and_python_stay_as_they_were() -> None:
    coin = lambda _, x: x * (1.0 + random.random()) + 0.1 * torch.randn_like(x)  # noqa: E731
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), Layers(coin), nn.Linear(4, 3)).double()
    views = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    gc = GradientConsistencyLoss(model, engine="loop", dropout="on")
    before, python = torch.get_rng_state(), random.getstate()
    values = []
    for seed in (3, 3, 4):
        gc(*views, generator=torch.Generator().manual_seed(seed))
        values.append(gc.last.cosine)
        assert torch.equal(torch.get_rng_state(), before)
        assert random.getstate() == python
        random.random()  # what the user draws in between changes nothing
        python = random.getstate()
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_last_survives_a_failed_call() -> None:
    """A call that raises leaves the record of the last good one, or none: never half a record."""
    p = CASES["mlp"].problem()
    loss = GradientConsistencyLoss(p.model)
    loss(*p.views)
    before = loss.last
    with pytest.raises(GradConsistError, match="strong"):
        loss(p.weak, p.strong[:3], p.target)
    assert loss.last is before or loss.last is None


def test_the_model_trains_as_before_after_a_call() -> None:
    """Outputs, buffer updates and dropout masks of the next forward are bitwise those of an untouched twin."""
    p, twin = CASES["cnn_batchnorm_train"].problem(), CASES["cnn_batchnorm_train"].problem()
    GradientConsistencyLoss(p.model)(*p.views).backward()
    assert torch.equal(p.model(p.weak), twin.model(twin.weak))
    assert state.of_model(p.model)["state_dict"] == state.of_model(twin.model)["state_dict"]


def test_nothing_is_left_alive() -> None:
    """The loss holds the model, never the other way round; graphs and views die with their tensors."""
    p = CASES["cnn_batchnorm_train"].problem()
    loss = GradientConsistencyLoss(p.model)
    value = loss(*p.views)
    value.backward()
    model, weak = weakref.ref(p.model), weakref.ref(p.weak)
    del p, value
    garbage.collect()
    assert weak() is None
    del loss
    garbage.collect()
    assert model() is None


def test_deepcopy_and_pickle_of_the_loss() -> None:
    p = CASES["mlp"].problem()
    loss = GradientConsistencyLoss(p.model, encoder=p.model[0], max_pairs=3, engine="loop")
    loss(*p.views)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert float(twin(*p.views).detach()) == float(copy.deepcopy(loss)(*p.views).detach())


def test_the_optimizer_may_step_between_forward_and_backward_of_another() -> None:
    """Parameters that move after the call: the fused form returns the gradient at the old point, or raises."""
    p = CASES["mlp"].problem()
    reference = p.judge().verdict().flat
    value = GradientConsistencyLoss(p.model)(*p.views)
    with torch.no_grad():
        for parameter in p.model.parameters():
            parameter.add_(1.0)
    try:
        flat = compare.gradient_of(value, p.model)
    except RuntimeError as error:
        assert "inplace" in str(error)  # noqa: PT017
        return
    assert compare.relative(flat, reference) <= 1e-8
