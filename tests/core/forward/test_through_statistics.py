"""`through_statistics`: the gradient of L_g as a function of the parameters, BatchNorm's statistics included.

The judge is the value of the term itself at displaced parameters: a central difference, which knows no derivative.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, diagnostics
from gradconsist._forward.batchnorm import Statistics
from gradconsist.engines.projection import RandomProjection
from gradconsist.errors import ConfigError, UnsupportedModuleError
from gradconsist.methods import FixMatch
from gradconsist.regularizers import GradientNormPenalty
from support import compare
from support.models import Layers

ENGINES = pytest.mark.parametrize("engine", ["loop", "vmap", "ghost", "auto"])
Views = tuple[Tensor, Tensor, Tensor]


def network() -> nn.Sequential:
    """Smooth, so that a difference quotient converges; BatchNorm behind and before what it depends on."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4),
    ).double()  # fmt: skip


def views(pairs: int = 6) -> Views:
    generator = torch.Generator().manual_seed(4)
    weak = torch.randn(pairs, 2, 6, 6, generator=generator, dtype=torch.float64)
    strong = weak + 0.4 * torch.randn(weak.shape, generator=generator, dtype=torch.float64)
    return weak, strong, torch.arange(pairs) % 4


def slope(model: nn.Module, term: Any, direction: list[Tensor], step: float = 1e-4) -> float:
    """d term / d step along `direction`, by a central difference of fourth order."""

    def value(length: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, part in zip(compare.trainable(moved), direction, strict=True):
                parameter += length * part
        return float(term(moved))

    return (8 * (value(step) - value(-step)) - value(2 * step) + value(-2 * step)) / (12 * step)


def directions(model: nn.Module, count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in compare.trainable(model)]
        for _ in range(count)
    ]


def along(gradient: Tensor, direction: list[Tensor]) -> float:
    return float(gradient @ torch.cat([part.flatten() for part in direction]))


#: (engine, fused, chunk_size): every engine in both forms, with chunks and without.
WAYS = [
    ("loop", True, 2), ("loop", False, None), ("vmap", True, None), ("vmap", False, 2),
    ("ghost", True, 2), ("ghost", False, None), ("ghost", True, None), ("ghost", False, 2), ("auto", True, "auto"),
]  # fmt: skip


def check(
    ways: list[Any],
    *,
    weight: Tensor | None = None,
    kind: Any = GradientConsistencyLoss,
    model: nn.Module | None = None,
    **plain: Any,
) -> None:
    model, pairs = network() if model is None else model, views()

    def value(moved: nn.Module) -> Tensor:
        return kind(moved, engine="loop", **plain)(*pairs, weight).detach()

    moves = directions(model, 3)
    truths = [slope(model, value, direction) for direction in moves]
    constant = compare.gradient_of(kind(model, **plain)(*pairs, weight), model)
    for direction, truth in zip(moves, truths, strict=True):
        assert abs(along(constant, direction) - truth) > 1e-3 * abs(truth)  # so that this test can tell them apart
    for engine, fused, chunk_size in ways:
        options = {"engine": engine, "fused": fused, "chunk_size": chunk_size, **plain}
        term = kind(model, **options, through_statistics=True)
        gradient = compare.gradient_of(term(*pairs, weight), model)
        for direction, truth in zip(moves, truths, strict=True):
            assert along(gradient, direction) == pytest.approx(truth, rel=1e-7, abs=1e-9), options


#: Some of the ways, and what else is given.
GIVEN: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "nothing": (WAYS, {}),
    "weights": (WAYS[::2], {"weight": torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0], dtype=torch.float64)}),
    "encoder": (WAYS[:1] + WAYS[4:6], {"encoder": lambda name: not name.startswith("8.")}),
    "projection": (WAYS[2:3] + WAYS[4:5], {"projection": RandomProjection(3, "kronecker", seed=1)}),
    "gradient norm": (WAYS[4:5], {"kind": GradientNormPenalty}),
}


@pytest.mark.parametrize(("ways", "given"), GIVEN.values(), ids=GIVEN)
def test_it_is_the_gradient_of_the_value(ways: list[Any], given: dict[str, Any]) -> None:
    check(ways, **given)


def test_statistics_that_depend_on_no_parameter() -> None:
    """A BatchNorm of the inputs, and one behind frozen layers, beside one that moves."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.BatchNorm2d(2), *network()).double()
    model[1].requires_grad_(False)
    check(WAYS[1::2], model=model)


UNMOVED: dict[str, Callable[[], nn.Module]] = {
    "of the inputs": lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4)).double(),
    "running": lambda: network().eval(),
}


@ENGINES
@pytest.mark.parametrize("build", UNMOVED.values(), ids=UNMOVED)
def test_nothing_to_follow_is_the_gradient_by_definition(build: Callable[[], nn.Module], engine: str) -> None:
    model = build()
    flat = [
        compare.gradient_of(GradientConsistencyLoss(model, engine=engine, through_statistics=on)(*views()), model)
        for on in (False, True)
    ]
    assert torch.equal(*flat)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])
def test_a_forward_with_other_statistics_is_refused(fused: bool) -> None:
    """It does something else where graphs are built."""
    model = Layers(lambda m, x: m.inner(1.5 * x if torch.is_grad_enabled() else x), inner=network())
    gc = GradientConsistencyLoss(model, through_statistics=True, fused=fused)
    with pytest.raises(UnsupportedModuleError, match="statistics changed when its forward ran again"):
        gc(*views())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])
def test_means_that_are_all_rounding(fused: bool) -> None:
    """Behind a BatchNorm with shift 0 and a linear layer every mean is 0 but for rounding, and forwards differ."""
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(2, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16),
        nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    weak, strong, target = views(64)
    gc = GradientConsistencyLoss(model, through_statistics=True, fused=fused)
    assert torch.isfinite(gc(weak.float(), strong.float(), target))


def test_verify_looks_at_it() -> None:
    model, pairs = network(), views()
    assert diagnostics.verify(GradientConsistencyLoss(model, through_statistics=True), *pairs).ok
    assert diagnostics.verify(GradientConsistencyLoss(model), *pairs).ok


@ENGINES
def test_a_random_subset_follows_the_statistics_of_all(engine: str) -> None:
    def term(moved: nn.Module, **options: Any) -> Tensor:
        gc = GradientConsistencyLoss(moved, engine=engine, max_pairs=2, **options)
        return gc(*views(), generator=torch.Generator().manual_seed(2))

    _assert_slope(term)


def test_reduction_none_has_each_pairs_own_gradient() -> None:
    cotangent = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
    _assert_slope(lambda m, **o: cotangent @ GradientConsistencyLoss(m, fused=False, reduction="none", **o)(*views()))


def _assert_slope(term: Callable[..., Tensor]) -> None:
    model = network()
    gradient = compare.gradient_of(term(model, through_statistics=True), model)
    for direction in directions(model, 2):
        truth = slope(model, lambda moved: term(moved).detach(), direction)
        assert along(gradient, direction) == pytest.approx(truth, rel=1e-7, abs=1e-9)


def test_two_calls_do_not_meet() -> None:
    """Nothing of one call's statistics is left for the next, nor in the model."""
    model, (weak, strong, target) = network(), views()
    gc = GradientConsistencyLoss(model, through_statistics=True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first = compare.gradient_of(gc(weak, strong, target), model)
    compare.gradient_of(gc(weak + 1.0, 2.0 * strong, target), model)
    assert torch.equal(compare.gradient_of(gc(weak, strong, target), model), first)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_measuring_is_the_same() -> None:
    model, pairs = network(), views()
    records = [GradientConsistencyLoss(model, through_statistics=on).measure(*pairs) for on in (False, True)]
    assert torch.equal(records[0].cosine, records[1].cosine)


def test_in_the_wrapper() -> None:
    model, (weak, strong, _) = network(), views()
    batch = SSLBatch(weak[:4], torch.arange(4), weak, strong)
    flat = []
    for weight, on in ((0.0, False), (0.5, False), (0.5, True)):
        gc = GradientConsistencyLoss(model, through_statistics=on)
        method = GGCRWrapper(FixMatch(model, threshold=0.0), gc, weight=weight, warmup_steps=0)
        flat.append(compare.gradient_of(method(batch).loss, model))
    with torch.no_grad():
        target = model.train()(torch.cat([weak[:4], weak, strong]))[4:10].argmax(1)
    term = GradientConsistencyLoss(model, through_statistics=True)(weak, strong, target)
    assert compare.relative(flat[2] - flat[0], 0.5 * compare.gradient_of(term, model)) < 1e-10
    assert compare.relative(flat[1], flat[2]) > 1e-6


def test_given_statistics_are_refused() -> None:
    model, pairs = network(), views()
    calls = [module for module in model if isinstance(module, nn.BatchNorm2d)]
    given = [Statistics(call.running_mean, call.running_var) for call in calls]
    with pytest.raises(ConfigError, match="go with given `statistics`"):
        GradientConsistencyLoss(model, through_statistics=True).evaluate(*pairs, statistics=given)


def test_float16_is_refused() -> None:
    model, (weak, strong, target) = network().float(), views()
    gc = GradientConsistencyLoss(model, through_statistics=True)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ConfigError, match="not been verified in float16"):
        gc(weak.float(), strong.float(), target)


def test_bfloat16_autocast_comes_close() -> None:
    model, (weak, strong, target) = network().float(), views()
    gc = GradientConsistencyLoss(model, through_statistics=True)
    exact = compare.gradient_of(gc(weak.float(), strong.float(), target), model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gc(weak.float(), strong.float(), target)
    assert compare.relative(compare.gradient_of(loss, model), exact) < 0.05
