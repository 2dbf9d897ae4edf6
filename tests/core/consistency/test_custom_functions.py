"""Custom autograd Functions: refused where their second derivative is wrong, named where nobody can tell."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from gradconsist import GradientConsistencyLoss
from gradconsist._consistency import custom_functions
from gradconsist.diagnostics import check, verify
from gradconsist.errors import UnsupportedModuleError
from support import compare
from support.models import Layers
from support.oracle import judge


class Swish(Function):
    """Right: it keeps its input as torch wants it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s + x * s * (1 - s))


class DetachedSwish(Swish):
    """The first derivative is right; of the second one a part is missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        s = ctx.x.sigmoid()
        return g * (s + ctx.x * s * (1 - s))


class DetachedWeight(Function):
    """A product whose backward forgets one of two ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.detach(), g.T @ x


class NewStyle(Swish):
    """With a context of its own, as vmap wants it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * x.sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class StraightThrough(Function):
    """No derivative of its forward, on purpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Kinked(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope, ctx.name, ctx.variable = (
            slope,
            "kinked",
            nn.Parameter(x.clone()),
        )  # names that a node's own methods have
        return torch.where(x > 0, x, slope * x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, g, ctx.slope * g), None


class Scaled(Function):
    """Chance in the forward, kept for the backward; it also writes into its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2.0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2.0 * g


class InFloat32(Swish):
    """Computes in float32 whatever it is given: no differences can be taken."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.float().sigmoid()
        return g * (s + x.float() * s * (1 - s)).to(g.dtype)


class Only32(Swish):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("kernel not implemented for this dtype")
        ctx.save_for_backward(x)
        return x * x.sigmoid()


class Picky(Swish):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise KeyError(x.dtype)
        return Swish.forward(ctx, x)


class Applies(nn.Module):
    def __init__(self, function: type[Function], *args: Any) -> None:
        super().__init__()
        self.function, self.args = function, args

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x * 1.0, *self.args)


class AppliesWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return DetachedWeight.apply(x, self.w)


def network(layer: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 8), layer, nn.Linear(8, 4))


def views(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    weak = torch.randn(4, 9, generator=g)
    return weak.to(dtype), (weak + 0.5 * torch.randn(4, 9, generator=g)).to(dtype), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("layer", [Applies(DetachedSwish), AppliesWeight()], ids=["detached input", "detached weight"])
def test_a_wrong_second_derivative_is_refused(layer: nn.Module, engine: str) -> None:
    model = network(layer).double()
    with pytest.raises(UnsupportedModuleError, match=r"Detached\w+ \(in '1'\) has a wrong second.*off by \d+%"):
        GradientConsistencyLoss(model, engine=engine)(*views())
    GradientConsistencyLoss(model, engine=engine).measure(*views())  # needs the first derivative only
    assert not verify(GradientConsistencyLoss(model), *views()).ok


RIGHT = {
    "Swish": Applies(Swish),
    "NewStyle": Applies(NewStyle),
    "StraightThrough": Applies(StraightThrough),
    "Kinked": Applies(Kinked, 0.1),
    "Scaled": Applies(Scaled),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_one_is_taken_and_known(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = network(RIGHT[name]).double()
    forward = RIGHT[name].function.forward
    gc = GradientConsistencyLoss(model, engine="loop")
    gc(*views()).backward()
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert compare.relative(found, judge(model, *views()).flat) <= 1e-8
    assert gc._probed.functions == {f"{name} (in '1')": True}
    assert RIGHT[name].function.forward is forward
    assert not caplog.records


@pytest.mark.parametrize("function", [InFloat32, Only32, Picky])
def test_one_that_cannot_be_tested_is_told_once(function: type[Function], caplog: pytest.LogCaptureFixture) -> None:
    model = network(Applies(function))
    gc = GradientConsistencyLoss(model, engine="loop")
    with caplog.at_level(logging.WARNING, "gradconsist"):
        for _ in range(3):
            gc(*views(torch.float32))
        model.eval()
        gc(*views(torch.float32))
    (record,) = caplog.records
    assert f"{function.__name__} (in '1')" in record.getMessage()
    assert "diagnostics.verify" in record.getMessage()
    report = str(check(gc, *views(torch.float32)))
    told = f"UNPROVEN: {function.__name__} (in '1'): test it with diagnostics.verify\nexact, by LoopEngine()"
    assert report.startswith(told)


def test_a_call_without_a_derivative_is_not_the_one_that_is_tested() -> None:
    """Here a Function is applied to the inputs, which have no derivative, before it is applied to features."""
    model = Layers(lambda m, x: m.head(Swish.apply(m.stem(Swish.apply(x)))), stem=nn.Linear(9, 8), head=nn.Linear(8, 4))
    gc = GradientConsistencyLoss(model.double())
    gc(*views())
    assert gc._probed.functions == {"Swish (in its forward)": True}


class WrongSometimes(Swish):
    """Right for eight small numbers at a time."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x = x if x.shape[-1] == 8 and x.abs().max() < 50 else x.detach()
        s = x.sigmoid()
        return g * (s + x * s * (1 - s))


def test_a_function_is_tested_for_every_shape() -> None:
    model = nn.Sequential(nn.Linear(9, 8), Applies(WrongSometimes), nn.Linear(8, 4), Applies(WrongSometimes)).double()
    with pytest.raises(UnsupportedModuleError, match=r"WrongSometimes \(in '3'\) has a wrong second derivative"):
        GradientConsistencyLoss(model)(*views())


def test_a_function_is_tested_again_with_other_data() -> None:
    weak, strong, target = views()
    gc = GradientConsistencyLoss(network(Applies(WrongSometimes)).double())
    for _ in range(15):
        gc(weak, strong, target)
    with pytest.raises(UnsupportedModuleError, match=r"WrongSometimes \(in '1'\) has a wrong second derivative"):
        gc(weak * 100, strong * 100, target)


def test_an_operator_of_a_library_is_one_too() -> None:
    """`torch.library.register_autograd` makes a Function of a formula, which may forget as much."""

    @torch.library.custom_op("gradconsist_tests::square", mutates_args=())
    def square(x: Tensor) -> Tensor:
        return x * x

    def keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.x = inputs[0].detach()

    square.register_autograd(lambda ctx, g: 2 * ctx.x * g, setup_context=keep)

    with pytest.raises(UnsupportedModuleError, match=r"square_default \(in '1'\) has a wrong second derivative"):
        GradientConsistencyLoss(network(Layers(lambda _, x: square(x))).double())(*views())


class Branching(nn.Module):
    """Applies a Function if a flag is set, or to samples whose first entry is large."""

    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        self.body, self.head, self.function, self.on = nn.Linear(5, 6), nn.Linear(6, 3), function, False

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        taken = (x[:, :1] > 5) | self.on
        if bool(taken.any()):
            h = torch.where(taken, self.function.apply(h), h)
        return self.head(torch.tanh(h))


class SwishOnce(Swish):
    """Its backward cannot be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Swish.backward(ctx, g)


class DetachedNewStyle(NewStyle):
    """With a context of its own, and without a part of its second derivative."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Swish.backward(ctx, g).detach() + 0 * g


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("way", ["flag", "other samples", "other call"])
@pytest.mark.parametrize(
    ("function", "engine"),
    [(DetachedSwish, "auto"), (DetachedSwish, "loop"), (SwishOnce, "auto"), (SwishOnce, "loop")]
    + [(DetachedNewStyle, engine) for engine in ("auto", "ghost", "vmap")],
)
def test_a_function_that_the_first_sample_did_not_run_is_refused(
    function: type[Function], engine: str, way: str, fused: bool
) -> None:
    torch.manual_seed(0)
    model, x, target = Branching(function).double(), torch.randn(6, 5).double(), torch.arange(6) % 3
    gc = GradientConsistencyLoss(model, engine=engine, chunk_size=2, fused=fused)
    if way != "other samples":
        gc(x, x + 0.1, target)
    model.on = way == "flag"
    x[3 if way == "other samples" else 0 :, 0] += 10
    with pytest.raises(UnsupportedModuleError, match="second derivative"):
        gc(x, x + 0.1, target)


def test_a_right_function_in_a_branch_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[str] = []
    own = custom_functions._error
    monkeypatch.setattr(custom_functions, "_error", lambda call: (tested.append(call.function.__name__), own(call))[1])
    torch.manual_seed(0)
    for function, engine in ((Swish, "loop"), (NewStyle, "ghost"), (NewStyle, "vmap")):
        model, x = Branching(function).double(), torch.randn(6, 5).double()
        x[3:, 0] += 10
        gc, target = GradientConsistencyLoss(model, engine=engine, chunk_size=2), torch.arange(6) % 3
        for _ in range(2):
            tested.clear()
            verdict = judge(model, x, x + 0.1, target)
            compare.assert_exact(gc, (x, x + 0.1, target), verdict)
        assert tested == []


def test_a_parameter_used_by_reference_in_a_branch_is_refused() -> None:
    def referring(m: Any, x: Tensor) -> Tensor:
        weight = m.alias[0] if bool((x[:, 0] > 5).all()) else m.body.weight
        return m.head(torch.tanh(nn.functional.linear(x, weight)))

    torch.manual_seed(0)
    x, target = torch.randn(4, 5), torch.arange(4) % 3
    x[2:, 0] += 10
    for engine in ("auto", "loop"):
        for fused in (True, False):
            model: Any = Layers(referring, body=nn.Linear(5, 6), head=nn.Linear(6, 3))
            model.alias = [model.body.weight]
            gc = GradientConsistencyLoss(model, engine=engine, fused=fused)
            with pytest.raises(UnsupportedModuleError, match=r"'body\.weight' is also used through a reference"):
                gc(x, x + 0.1, target)
