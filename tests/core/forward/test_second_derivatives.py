"""Torch's wrong second derivatives: by formula or refused by name, wherever they hide, and found by `verify`.

`benchmarks/derivatives/sweep_derivatives.py` is the search for them; here is what it found. Differences of L_g itself:
test_oracle, on which test_exactness and test_ghost rest, and tests/slow/directional.py.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.overrides import TorchFunctionMode

from gradconsist import GradientConsistencyLoss, diagnostics
from gradconsist._consistency import comparison, trial
from gradconsist._consistency.similarity import cosine, degenerate_pairs
from gradconsist._forward import per_sample as forward_module
from gradconsist._refusals import models as guards
from gradconsist.engines import vmap as vmap_module
from gradconsist.errors import UnsupportedModuleError
from gradconsist.types import GradProducts
from support import compare
from support.models import Layers
from support.nets import net, views
from support.oracle import judge
from support.zoo import CASES

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch, of vmap


def scripted(function: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated; models that use it are about
        compiled = torch.jit.script(function)
    return lambda x, w: compiled(x, w)  # a plain function, since a model that holds the other cannot be copied


@scripted
def scripted_weight_norm(x: Tensor, w: Tensor) -> Tensor:
    return x @ torch._weight_norm(torch.outer(w, w.sin()) + 0.3, w[:, None].exp(), 0)


def _problem(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A function of features and of a parameter, between two linear layers."""
    model = net(lambda net, x: function(net.stem(x), net.gain).tanh())
    del model.shift  # nothing uses it
    return model, *views(3)


@pytest.mark.parametrize("way", ["flag", "some samples", "all samples"])
def test_a_script_that_the_first_call_did_not_run_is_refused_by_vmap(way: str) -> None:
    function = scripted(types.FunctionType(_gated.__code__, globals(), f"gated_{way[:4]}"))

    def switching(net: Any, x: Tensor) -> Tensor:
        """Runs the script if a flag is set, or on samples whose first entry is large."""
        h = net.stem(x)
        return (function(h, net.gain) if net.on or bool((x[:, 0] > 5).all()) else h).tanh()

    model: Any = net(switching)
    model.on = False
    x, _, target = views(3)
    for _ in range(3):
        function(model.stem(x), model.gain).sum().backward()
    gc = GradientConsistencyLoss(model, engine="vmap")
    gc(x, x + 0.4, target)
    model.on = way == "flag"
    x[{"flag": 3, "some samples": 2, "all samples": 0}[way] :, 0] += 10
    with pytest.raises(UnsupportedModuleError, match=r"torch\.jit\.script, which vmap differentiates only once"):
        gc(x, x + 0.4, target)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_scripted_functions_are_exact_or_refused(engine: str, warm: bool) -> None:
    """A warm one has a graph of its own, which vmap of grad cuts off from the parameters outside."""
    # Compiled anew: the first run, with a graph or without, decides how all later ones are differentiated.
    problem = _problem(scripted(types.FunctionType(_gated.__code__, globals(), f"gated_{engine}_{warm}")))
    for _ in range(3 * warm):
        problem[0](problem[1]).sum().backward()
    problem[0].zero_grad()
    gc = GradientConsistencyLoss(problem[0], engine=engine)
    verdict = judge(*problem)
    try:
        loss = gc(*problem[1:])
    except UnsupportedModuleError as error:
        assert engine == "vmap"
        assert "torch.jit.script, which vmap differentiates only once" in str(error)  # noqa: PT017
        gc.measure(*problem[1:])  # the first derivative is right
        return
    assert not (engine == "vmap" and warm)
    compare.assert_agrees(gc.last, loss, compare.gradient_of(loss, problem[0]), verdict, dtype=torch.float64)


def _gated(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.sigmoid(w * x) + torch.tanh(x + w)


def test_cross_map_lrn_is_refused() -> None:
    """Its derivative is not that of its value, and `measure` would need no second one."""
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.CrossMapLRN2d(3), nn.Flatten(), nn.Linear(24, 3))
    with pytest.raises(UnsupportedModuleError, match=r"`model\.1` is a CrossMapLRN2d.*LocalResponseNorm"):
        GradientConsistencyLoss(model)


# `verify` finds each of them, in a library that has neither the formula nor the refusal.


class FrozenNorm(torch.autograd.Function):
    """weight_norm with torch's mistake, and no name to know it by: in the backward, ||v|| is a constant."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor) -> Tensor:
        norm = v.norm(dim=1, keepdim=True)
        ctx.save_for_backward(v, g, norm)
        return v * (g / norm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        v, g, norm = ctx.saved_tensors
        inner = (grad * v).sum(1, keepdim=True)
        return (g / norm) * (grad - v * inner / norm.square()), inner / norm


def frozen_norm(x: Tensor, w: Tensor) -> Tensor:
    return x @ FrozenNorm.apply(torch.outer(w, w.sin()) + 0.3, w[:, None].exp())


def by_frequency(x: Tensor, w: Tensor) -> Tensor:
    tokens = torch.tensor([0, 2, 2, 1, 2, 0])
    return x * F.embedding(tokens, w[:3, None], scale_grad_by_freq=True).squeeze(1).sin()


def layer_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, (6,), w)


def instance_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.instance_norm(x[:, None], weight=w[:1])[:, 0]


def weight_norm(x: Tensor, w: Tensor) -> Tensor:
    return x @ torch._weight_norm(torch.outer(w, w.sin()) + 0.3, w[:, None].exp(), 0)


class _Nothing(TorchFunctionMode):
    """In place of the mode that computes single functions by other formulas."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


FOUND = {
    "weight_norm": (weight_norm, ("loop", "vmap", "ghost")),
    "weight_norm, scripted": (scripted_weight_norm, ("loop",)),
    "weight_norm, a function of one's own": (frozen_norm, ("loop",)),
    "layer_norm": (layer_norm, ("vmap",)),
    "instance_norm": (instance_norm, ("vmap",)),
    "embedding, scale_grad_by_freq": (by_frequency, ("loop",)),
}


@pytest.mark.parametrize(("function", "engine"), [(f, engine) for f, engines in FOUND.values() for engine in engines])
def test_verify_finds_it_without_our_handling(function: Any, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem(function)
    if function in (weight_norm, layer_norm, instance_norm):
        assert diagnostics.verify(GradientConsistencyLoss(problem[0], engine=engine), *problem[1:], directions=2).ok
    monkeypatch.setattr(forward_module, "_ComparisonMode", _Nothing)
    monkeypatch.setattr(trial, "check_first_derivative", lambda loss, own: None)
    monkeypatch.setattr(comparison, "check_second_derivative", lambda *args, **options: set())
    monkeypatch.setattr(vmap_module, "check_batched", lambda gradients: None)
    report = diagnostics.verify(GradientConsistencyLoss(problem[0], engine=engine), *problem[1:], directions=2)
    assert not report.ok
    assert report.worst > 1e-3, str(report)
    assert report.suspects


def test_max_norm_is_found_without_our_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASES["tied_embedding"].problem()
    problem.model.embedding.max_norm = 0.3
    with pytest.raises(UnsupportedModuleError, match="max_norm"):
        diagnostics.verify(GradientConsistencyLoss(problem.model, loss_fn=problem.case.loss_fn), *problem.views)
    monkeypatch.setattr(forward_module, "_ComparisonMode", _Nothing)
    monkeypatch.setattr(guards, "_check_module", lambda where, module: None)
    # A forward that writes into the weights is found before any derivative is.
    with pytest.raises(UnsupportedModuleError, match="changes with the other samples"):
        diagnostics.verify(GradientConsistencyLoss(problem.model, loss_fn=problem.case.loss_fn), *problem.views)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-3, 1.0), (30.0, 0.01)])
def test_both_derivatives_of_the_cosine_as_a_function_of_two_vectors(scales: tuple[float, float]) -> None:
    def core(a: Tensor, b: Tensor) -> Tensor:
        products = GradProducts(a.square().sum(1), b.square().sum(1), (a * b).sum(1))
        return cosine(products, degenerate_pairs(products, 1e-8))

    a, b = (scale * torch.randn(4, 5, dtype=torch.float64) for scale in scales)
    a[1] = 0.0  # a degenerate pair: no value, no derivative
    b[2] = 2.0 * a[2]  # the edge, where the value is clamped and the derivative is not
    vectors = a.requires_grad_(), b.requires_grad_()
    eps = 1e-6 * min(scales)
    live = lambda a, b: core(a, b)[[0, 2, 3]]  # noqa: E731
    assert gradcheck(live, vectors, eps=eps, atol=1e-6 / min(scales), rtol=1e-5)
    assert gradgradcheck(
        live, vectors, eps=eps, atol=1e-6 / min(scales) ** 2, rtol=1e-5, gen_non_contig_grad_outputs=True
    )
    first = torch.autograd.grad(core(*vectors).sum(), vectors)
    assert all(float(gradient[1].abs().max()) == 0.0 for gradient in first)


def norms_of_groups(m: Any, x: Tensor) -> Tensor:
    """Logits from the norms of three groups of features, the last of which is zero."""
    return m.head(m.norm(m.body(x).unflatten(1, (3, 2)) * m.mask))


NORMS = {
    "Tensor.norm": lambda g: g.norm(dim=2),
    "Tensor.norm with p": lambda g: g.norm(2, 2, True).squeeze(2),
    "torch.norm": lambda g: torch.norm(g, dim=2),
    "vector_norm": lambda g: torch.linalg.vector_norm(g, dim=2),
    "normalize": lambda g: F.normalize(g, dim=2).sum(2),
}


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_norm_of_a_zero_vector_has_a_second_derivative(norm: Any, engine: str) -> None:
    """0, as its first one: torch's own is NaN."""
    outcomes = []
    for function in (norm, lambda g: torch.cat([norm(g[:, :2]), torch.zeros_like(g[:, 2:, 0])], 1)):
        torch.manual_seed(0)
        model = Layers(norms_of_groups, body=nn.Linear(4, 6), head=nn.Linear(3, 3)).double()
        model.norm = function
        model.register_buffer("mask", torch.tensor([1.0, 1.0, 0.0]).double().view(3, 1))
        weak, strong = torch.randn(5, 4).double(), torch.randn(5, 4).double()
        gc = GradientConsistencyLoss(model, engine=engine)
        loss = gc(weak, strong, torch.arange(5) % 3)
        outcomes.append((gc.last.cosine, compare.gradient_of(loss, model)))
    (cosine, gradient), (expected_cosine, expected) = outcomes
    assert bool(gradient.isfinite().all())
    if norm is not NORMS["normalize"]:  # whose derivative at zero is 1 / eps, and not a constant's
        assert compare.cosine_error(cosine, expected_cosine) <= 1e-10
        assert compare.relative(gradient, expected) <= 1e-8
