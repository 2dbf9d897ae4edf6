"""12 checks at 9 points of a call, 108 an engine and form: nothing of the user's has changed, bitwise.

More models, and every single forward in turn: test_state.
"""

from __future__ import annotations

import random
from collections import UserList
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss
from gradconsist._forward import isolation
from gradconsist.engines import GradProducts
from support import state
from support.zoo import CASES, Problem

POINTS = [
    "success", "statistics", "first view", "second view", "loss function", "first derivative", "later chunk",
    "second derivative", "interrupt",
]  # fmt: skip
CHECKS: dict[str, Callable[[str], bool]] = {
    "hooks": lambda key: "hooks" in key,
    "modes": lambda key: key.endswith(": training"),
    "requires_grad": lambda key: key.endswith(": requires_grad"),
    "parameters": lambda key: key.endswith((": identity", ": value")),
    "gradients": lambda key: key.endswith(": grad"),
    "buffers": lambda key: key.endswith(": buffer"),
    "random state": lambda key: key in ("random state", "python random state"),
    "state_dict": lambda key: key == "state_dict",
    "attributes": lambda key: key.endswith((": attributes", ": class")),
    "flags of torch": lambda key: key in FLAGS or key.startswith(("F.", "torch.")),
    "modes of torch, and the lock": lambda key: key in ("function modes", "dispatch modes", "lock", "checkpoint"),
    "outputs": lambda key: key.startswith("output"),
}
FLAGS = {
    *("grad mode", "inference mode", "anomaly", "autocast", "flash", "memory efficient", "math", "cudnn attention"),
    *("attention fast path", "cudnn", "mkldnn", "precision", "default dtype", "threads", "deterministic"),
}
KEPT: dict[tuple[str, str, bool], int] = {}


class PlantedError(Exception):
    """What a point raises."""


class _Layer(nn.Module):
    """Passes its input on, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: UserList[Tensor] = UserList()  # a list would be restored after each forward
        self.act: Callable[[int, Tensor], Tensor] = lambda call, x: x

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x)
        return self.act(len(self.calls), x)


class _Backward(torch.autograd.Function):
    """Identity whose n-th derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: int, error: type[BaseException]) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.order, ctx.error = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.order == 1:
            raise ctx.error("planted")
        return _Backward.apply(gradient, ctx.order - 1, ctx.error), None, None


class _Products:
    """An engine, and what may be done to its products: where the second derivative begins."""

    def __init__(self, inner: Any, act: Callable[[int, Tensor], Tensor]) -> None:
        self.inner, self.act, self.calls = inner, act, 0

    def products(self, problem: Any) -> GradProducts:
        self.calls += 1
        weak, strong, cross, _ = self.inner.products(problem)
        return GradProducts(weak, strong, self.act(self.calls, cross))


def _problem() -> tuple[Problem, _Layer]:
    """BatchNorm, dropout, attributes, hooks, a frozen parameter, gradients: all that could be disturbed."""
    p, layer = CASES["cnn_batchnorm_train"].problem(), _Layer()
    parts = list(p.model)
    p.model = nn.Sequential(*parts[:3], nn.Dropout(0.3), layer, *parts[3:]).double()
    p.model[0].bias.requires_grad_(False)
    p.model[3].register_forward_hook(lambda *_: None)
    p.model[2].note = [1, 2]
    for index, parameter in enumerate(p.model.parameters()):
        parameter.grad = torch.full_like(parameter, float(index)) if parameter.requires_grad else None
    return p, layer


def _snapshot(p: Problem) -> dict[str, Any]:
    found = state.snapshot(p.model)
    found["python random state"] = hash(random.getstate())
    free = isolation._lock.acquire(blocking=False)
    if free:
        isolation._lock.release()
    found["lock"] = (free, getattr(isolation._here, "compares", False))
    found["checkpoint"] = [getattr(torch.utils.checkpoint, name, None) for name in isolation._CHECKPOINTS]
    # What the model returns next, in both modes, on a copy so that looking changes nothing.
    modes = [module.training for module in p.model.modules()]
    buffers = {name: buffer.clone() for name, buffer in p.model.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        found["output in its modes"] = state.digest(p.model(p.weak))
        for name, buffer in p.model.named_buffers():
            buffer.copy_(buffers[name])
        found["output in eval mode"] = state.digest(p.model.eval()(p.weak))
    for module, mode in zip(p.model.modules(), modes, strict=True):
        module.training = mode
    return found


def _plant(point: str, layer: _Layer, error: type[BaseException]) -> tuple[Any, Any]:
    """Sets the layer up; returns a loss function, and what an engine's products go through."""

    def at(*calls: int) -> Callable[[int, Tensor], Tensor]:
        def act(call: int, x: Tensor) -> Tensor:
            if call in calls:
                raise error("planted")
            return x

        return act

    entropy = lambda z, t: F.cross_entropy(z, t, reduction="none")  # noqa: E731
    through: Callable[[int, Tensor], Tensor] = lambda call, x: x  # noqa: E731
    loss_fn = entropy
    if point == "statistics":
        layer.act = at(1)
    elif point in ("first view", "interrupt"):
        layer.act = at(2)
    elif point == "second view":
        layer.act = at(3)
    elif point == "first derivative":
        layer.act = lambda call, x: _Backward.apply(x, 1, error)
    elif point == "loss function":

        def loss_fn(z: Tensor, t: Tensor) -> Tensor:
            raise error("planted")
    elif point == "later chunk":
        through = at(2)
    elif point == "second derivative":
        through = lambda call, x: _Backward.apply(x, 1, error)  # noqa: E731
    return loss_fn, through


@contextmanager
def _expected(point: str, error: type[BaseException]) -> Iterator[None]:
    if point == "success":
        yield
        return
    with pytest.raises(error, match="planted"):
        yield


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])
@pytest.mark.parametrize("engine", ["auto", "loop", "vmap", "ghost"])
@pytest.mark.parametrize("point", POINTS)
def test_at_each_point_twelve_things_are_as_before(point: str, engine: str, fused: bool) -> None:
    p, layer = _problem()
    error: type[BaseException] = KeyboardInterrupt if point == "interrupt" else PlantedError
    loss_fn, through = _plant("success", layer, error)
    gc = GradientConsistencyLoss(p.model, engine=engine, fused=fused, chunk_size=2, loss_fn=loss_fn)
    if point in ("first view", "second view"):  # what a first call tries is known by then
        gc(*p.views)
    elif point in ("later chunk", "second derivative"):
        gc.engine = _Products(gc.engine, through)  # type: ignore[assignment]
    gc.loss_fn, through = _plant(point, layer, error)
    if isinstance(gc.engine, _Products):
        gc.engine.act = through
    act, layer.act = layer.act, lambda call, x: x
    before = _snapshot(p)
    layer.act = act
    layer.calls.clear()
    with _expected(point, error):
        gc(*p.views)
    if point == "first derivative":
        with _expected(point, error):
            gc.measure(*p.views)
    layer.act = lambda call, x: x
    changed = state.differences(before, _snapshot(p))
    kept = {name: not any(check(key) for key in changed) for name, check in CHECKS.items()}
    assert changed == []
    assert all(any(check(key) for key in before) for check in CHECKS.values()), "every check looks at something"
    KEPT[point, engine, fused] = sum(kept.values())


def test_every_entry_of_a_snapshot_belongs_to_a_check() -> None:
    p, _ = _problem()
    assert [key for key in _snapshot(p) if not any(check(key) for check in CHECKS.values())] == []


def test_the_checks_see_what_they_are_for() -> None:
    """A negative control: each check fails when its thing is changed."""
    p, _ = _problem()
    changes: dict[str, Callable[[], Any]] = {
        "hooks": lambda: p.model[1].register_forward_hook(lambda *_: None),
        "modes": lambda: p.model[3].eval(),
        "requires_grad": lambda: p.model[0].weight.requires_grad_(False),
        "parameters": lambda: p.model[0].weight.data.add_(1e-12),
        "gradients": lambda: p.model[0].weight.grad.add_(1.0),
        "buffers": lambda: p.model[1].running_mean.add_(1e-12),
        "random state": lambda: torch.rand(1),
        "state_dict": lambda: p.model.register_buffer("extra", torch.zeros(1)),
        "attributes": lambda: setattr(p.model[2], "other", 3),
        "flags of torch": lambda: torch.backends.mha.set_fastpath_enabled(False),
        "modes of torch, and the lock": lambda: isolation._lock.acquire(),
        "outputs": lambda: p.model[0].weight.data.mul_(1.5),
    }
    assert set(changes) == set(CHECKS)
    try:
        for name, change in changes.items():
            before = _snapshot(p)
            change()
            assert any(CHECKS[name](key) for key in state.differences(before, _snapshot(p))), name
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        isolation._lock.release()


def test_108_checks_an_engine_and_form(record_testsuite_property: Callable[[str, object], None]) -> None:
    """The figure, of the tests that ran before this one."""
    assert len(POINTS) * len(CHECKS) == 108
    forms = {(engine, fused) for _, engine, fused in KEPT}
    if len(KEPT) < len(POINTS) * 8:
        pytest.skip("only some of the points were run")
    for form in forms:
        kept = sum(count for (_, *rest), count in KEPT.items() if tuple(rest) == form)
        record_testsuite_property(f"state_checks_{form[0]}_{'fused' if form[1] else 'graph'}", f"{kept} of 108")
        assert kept == 108
