"""Where Python sees another world than the plain forward: no mode is active below vmap, and tensors lie above it."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss
from gradconsist.diagnostics import check
from gradconsist.engines import GhostEngine, register_rule, unregister_rule
from gradconsist.engines.ghost.capture import Capture
from gradconsist.errors import UnsupportedModuleError
from support import compare
from support.models import Layers
from support.nets import assert_exact, net, views


def _double(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double()


def _branching(m: Any, x: Tensor) -> Tensor:
    """Control flow on a value that is read below Python's methods, which vmap refuses; both branches are linear."""
    return torch.tanh(m.inner(x)) if torch.ops.aten.item(x.detach()[..., 0].sum()) > 0 else m.other(x)


def branches(inner: nn.Module) -> nn.Module:
    return Layers(_branching, inner=inner, other=nn.Linear(6, 6))


def _around(middle: nn.Module) -> nn.Module:
    return _double(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), middle, nn.Linear(6, 3)))


@pytest.mark.parametrize("engine", ["ghost", "auto"])
def test_a_module_that_vmap_refuses_runs_sample_by_sample(engine: str) -> None:
    model = _around(branches(nn.Linear(6, 6)))
    assert_exact(model, engine)
    report = check(GradientConsistencyLoss(model, engine=engine), *views())
    assert report.ok
    assert "GhostEngine" in report.engine
    assert str(report).startswith("SLOW: run sample by sample (reasons below): '2'\nexact, by ")
    assert "runs sample by sample" in report.notes["2"]


def test_the_rules_of_the_comparison_hold_inside_a_looped_module() -> None:
    """weight_norm by formula, dropout off: below vmap no function mode is active by itself."""
    pytest.importorskip("torch.nn.utils.parametrizations")
    inner = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Dropout(0.5))
    model = _around(branches(inner))
    by_loop = GradientConsistencyLoss(model, engine="loop")(*views())
    expected = compare.gradient_of(by_loop, model)
    by_ghost = GradientConsistencyLoss(model, engine="ghost")(*views())
    assert compare.relative(compare.gradient_of(by_ghost, model), expected) <= 1e-10


def test_an_engine_that_serves_two_models_keeps_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = GhostEngine()
    branching, plain = _around(branches(nn.Linear(6, 6))), _around(nn.Linear(6, 6))
    assert_exact(branching, engine)
    assert set(engine.looped(branching)) == {"2"}
    # Not sample by sample, as the other model's module of that name.
    monkeypatch.setattr(Capture, "one_by_one", lambda *_, **__: pytest.fail("sample by sample"))
    assert_exact(plain, engine)
    assert engine.looped(plain) == {}


def test_a_branch_under_no_grad_is_a_constant() -> None:
    """And no reason to loop."""

    def gated(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(net.gate(x))
        return torch.tanh(net.stem(x)) * gate

    engine, model = GhostEngine(), net(gated, gate=nn.Linear(5, 6))
    assert_exact(model, engine)
    assert engine.looped(model) == {}


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])
@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_nothing_outlives_a_call_even_without_the_garbage_collector(engine: str, fused: bool) -> None:
    model = _double(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)))
    loss = GradientConsistencyLoss(model, engine=engine, fused=fused)
    loss(*views()).backward()
    before = _tensors()
    for _ in range(5):
        loss(*views()).backward()
    assert _tensors() <= before


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@pytest.fixture
def mixing_rule() -> Iterator[None]:
    register_rule(Mixing, lambda layer, x, d: {"weight": torch.einsum("ni,nj->nij", d, x)})
    yield
    unregister_rule(Mixing)


@pytest.mark.usefixtures("mixing_rule")
def test_a_registered_rule_works_under_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Mixing(), nn.Tanh(), nn.Linear(5, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_rule = GradientConsistencyLoss(model, engine="ghost")
        by_rule(*views(dtype=torch.float32))
        by_loop = GradientConsistencyLoss(model, engine="loop")
        by_loop(*views(dtype=torch.float32))
    assert by_rule.last is not None
    assert by_loop.last is not None
    assert compare.cosine_error(by_rule.last.cosine, by_loop.last.cosine) <= 2e-2


def test_long_inner_products_keep_their_digits_in_float32() -> None:
    """A per-sample gradient of a million entries; a matrix product over so many would lose three digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(384, 384, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384 * 4, 3))
    weak = torch.randn(2, 384, 4, 4)
    strong, target = weak + 0.5 * torch.randn_like(weak), torch.tensor([0, 1])
    ghost = GradientConsistencyLoss(model, engine="ghost").measure(weak, strong, target)
    double = copy.deepcopy(model).double()
    exact = GradientConsistencyLoss(double, engine="loop").measure(weak.double(), strong.double(), target)
    assert compare.cosine_error(ghost.cosine, exact.cosine) <= 2e-6


def test_a_loss_with_the_engine_can_be_copied_and_pickled() -> None:
    model = _around(branches(nn.Linear(6, 6)))
    loss = GradientConsistencyLoss(model, engine=GhostEngine(form="gram"))
    value = loss(*views()).item()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin(*views()).item() == value
        assert repr(twin.engine) == repr(loss.engine)


def _remembers(m: Any, x: Tensor, cache: Any) -> Tensor:
    """Puts its state into an argument, as attention does with a cache, and goes on from what it finds there."""
    known = cache if isinstance(cache, list) else cache.rows
    h = m.inner(x) + (known[-1] if known else 0.0)
    known.append(h)
    return h if torch.ops.aten.item(h.sum()) > 0 else h.clone()  # vmap refuses to look


def _cached(kind: Callable[[], Any]) -> nn.Module:
    """Makes a cache, calls a layer with it, and reads what the layer left there."""

    def forward(m: Any, x: Tensor) -> Tensor:
        cache = kind()
        h = m.part(m.stem(x), cache).tanh()
        return m.head(h + sum(cache if isinstance(cache, list) else cache.rows))

    part = Layers(_remembers, inner=nn.Linear(6, 6))
    return Layers(forward, stem=nn.Linear(5, 6), part=part, head=nn.Linear(6, 3))


class Rows:
    """A cache."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []


@pytest.mark.parametrize("kind", [Rows, list])
def test_no_sample_finds_what_another_left_in_an_argument(kind: Callable[[], Any]) -> None:
    model = _double(_cached(kind))
    with pytest.raises(UnsupportedModuleError, match="engine='loop'"):
        GradientConsistencyLoss(model, engine="ghost")(*views())
    assert_exact(model, "auto")
