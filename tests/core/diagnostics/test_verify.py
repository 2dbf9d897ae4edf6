"""diagnostics.verify: passes where the gradient is right, fails where a planted second derivative is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss, RandomProjection, diagnostics
from gradconsist.engines import GradProducts, LoopEngine, Problem, register_rule, unregister_rule
from gradconsist.errors import ConfigError, GradConsistError
from gradconsist.regularizers import GradientNormPenalty
from support import state
from support.zoo import CASES

MODELS = [
    "mlp", "mlp_inplace_relu", "mlp_layernorm", "mlp_user_loss", "cnn_batchnorm_train", "cnn_batchnorm_eval",
    "cnn_batchnorm_functional", "cnn_batchnorm_twice", "cnn_groupnorm", "vit_dropout", "tied_embedding", "text_dict",
    "two_inputs", "weight_norm", "frozen_subset", "lstm",
]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_it_passes_on_the_zoo(name: str) -> None:
    """Every other model in float32: the test itself is run in float64, on a copy."""
    p = CASES[name].problem(dtype=torch.float32 if MODELS.index(name) % 2 else torch.float64)
    before = {**state.of_process(), **state.of_model(p.model)}
    report = diagnostics.verify(
        GradientConsistencyLoss(p.model, loss_fn=p.case.loss_fn, encoder=p.case.encoder), *p.views
    )
    assert report.ok, str(report)
    assert report.worst < 1e-5
    assert state.differences(before, {**state.of_process(), **state.of_model(p.model)}) == []


def test_it_passes_with_a_parameter_that_the_forward_does_not_use() -> None:
    p = CASES["mlp"].problem()
    p.model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    assert diagnostics.verify(GradientConsistencyLoss(p.model), *p.views).ok


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_it_passes_with_both_engines(engine: str) -> None:
    p = CASES["cnn_batchnorm_train"].problem()
    assert diagnostics.verify(GradientConsistencyLoss(p.model, engine=engine), *p.views).ok


class _WrongSecondDerivative(torch.autograd.Function):
    """tanh, with a right first derivative whose own derivative is wrong: 1 - y^2 treated as a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y.detach().square())


class Planted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _WrongSecondDerivative.apply(x)


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_it_fails_on_a_wrong_second_derivative(engine: str) -> None:
    p = CASES["mlp"].problem()
    p.model[3] = Planted()
    report = diagnostics.verify(GradientConsistencyLoss(p.model, engine=engine), *p.views)
    assert not report.ok
    assert report.worst > 1e-4
    assert "fail" in str(report).lower() or "wrong" in str(report).lower() or "not" in str(report).lower()


def test_it_fails_on_a_small_error() -> None:
    """A few percent of one of many layers is still a wrong gradient."""

    class Slightly(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.98 * torch.tanh(x) + 0.02 * _WrongSecondDerivative.apply(x)

    p = CASES["mlp"].problem()
    p.model[1] = Slightly()
    assert not diagnostics.verify(GradientConsistencyLoss(p.model), *p.views).ok


def test_it_fails_on_a_term_that_is_small_as_a_whole() -> None:
    """Errors are relative: with weights of 1e-5 a wrong derivative is as wrong as before."""
    p = CASES["mlp"].problem()
    p.model[3] = Planted()
    report = diagnostics.verify(GradientConsistencyLoss(p.model), *p.views, torch.full((5,), 1e-5))
    assert not report.ok
    p.model[3] = nn.Tanh()
    assert diagnostics.verify(GradientConsistencyLoss(p.model), *p.views, torch.full((5,), 1e-5)).ok


def test_the_parameters_that_disagree_are_named() -> None:
    p = CASES["mlp"].problem()
    assert diagnostics.verify(GradientConsistencyLoss(p.model), *p.views).suspects == []
    p.model[3] = Planted()
    report = diagnostics.verify(GradientConsistencyLoss(p.model), *p.views)
    names = {entry.name for entry in report.suspects}
    assert "2.weight" in names
    assert all(name in str(report) for name in names)
    assert report.stopped == ()
    assert "DISAGREES" in str(report)


class Stopped(nn.Module):
    """Uses a linear layer in a way that finite differences do not follow, or with a NaN as its second derivative."""

    def __init__(self, how: str, width: int) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(width, width), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.how == "straight-through":
            return y + ((4 * y).round() / 4 - y).detach()
        if self.how == "detach":
            return x * torch.sigmoid(y.detach())
        return x + (y - y.detach()).abs().pow(1.5)


@pytest.mark.parametrize("how", ["straight-through", "detach", "nan"])
def test_a_stopped_gradient_is_told_from_a_wrong_one(how: str) -> None:
    p = CASES["mlp"].problem()
    p.model[1] = Stopped(how, p.model[0].out_features).double()
    report = diagnostics.verify(GradientConsistencyLoss(p.model), *p.views)
    assert not report.ok
    assert report.suspects
    assert ("1.linear.weight" in report.stopped) == (how != "nan")
    assert ("NOT TESTED" in str(report)) == (how != "nan"), str(report)


def test_one_direction_that_disagrees_is_enough() -> None:
    good, bad = (diagnostics.DirectionError("all parameters", 1.0, 1.0, {1e-4: e, 1e-5: 2 * e}) for e in (1e-9, 1e-2))
    assert diagnostics.VerifyReport([good, good], [], 1e-4).ok
    report = diagnostics.VerifyReport([good, bad, good], [], 1e-4)
    assert not report.ok
    assert report.worst == bad.error == 1e-2


def test_report() -> None:
    p = CASES["mlp"].problem()
    report = diagnostics.verify(GradientConsistencyLoss(p.model), *p.views, directions=3, seed=5)
    again = diagnostics.verify(GradientConsistencyLoss(p.model), *p.views, directions=3, seed=5)
    assert report.worst == again.worst
    assert diagnostics.verify(GradientConsistencyLoss(p.model), *p.views, directions=3, seed=6).worst != report.worst
    assert isinstance(report.ok, bool)
    assert f"{report.worst:.0e}"[:2] in str(report) or "worst" in str(report).lower()


def test_weights_and_options_are_part_of_what_is_verified() -> None:
    p = CASES["cnn_batchnorm_train"].problem()
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])
    assert diagnostics.verify(GradientConsistencyLoss(p.model, encoder=p.model[0]), *p.views, weight).ok


def test_bad_options() -> None:
    p = CASES["mlp"].problem()
    with pytest.raises(GradConsistError, match="directions"):
        diagnostics.verify(GradientConsistencyLoss(p.model), *p.views, directions=0)
    with pytest.raises(GradConsistError, match="target"):
        diagnostics.verify(GradientConsistencyLoss(p.model), p.weak, p.strong, p.target[:2])


def test_it_verifies_the_loss_that_is_trained() -> None:
    """Chance with the same draws everywhere, a projection that changes with every call, another criterion."""
    p = CASES["vit_dropout"].problem(pairs=2)
    encoder = lambda name: "blocks.0" in name or "head" in name or name.endswith("0.weight")  # noqa: E731
    for options in ({"dropout": "on"}, {"projection": RandomProjection(3, "kronecker", resample_every=1)}):
        gc = GradientConsistencyLoss(p.model, encoder=encoder, max_pairs=1, stop_gradient="weak", **options)
        assert diagnostics.verify(gc, *p.views, directions=2).ok, options
        assert gc.last is None
    p = CASES["mlp"].problem()
    assert diagnostics.verify(GradientNormPenalty(p.model), *p.views, directions=2).ok
    observed = GradientConsistencyLoss(CASES["cnn_batchnorm_train"].problem().model, batchnorm="observed")
    assert diagnostics.verify(observed, *CASES["cnn_batchnorm_train"].problem().views, directions=1).ok
    with pytest.raises(ConfigError, match="`consistency` is of type Sequential: pass the GradientConsistencyLoss"):
        diagnostics.verify(p.model, *p.views)


class _TooSmall(LoopEngine):
    """Its cosines are wrong, and their derivative is that of the wrong value."""

    def products(self, problem: Problem) -> GradProducts:
        products = super().products(problem)
        return products._replace(cross=0.9 * products.cross)


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize("what", ["engine", "rule"])
def test_it_fails_where_only_the_value_is_wrong(what: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), _Scale(), nn.Tanh(), nn.Linear(6, 3))
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert diagnostics.verify(GradientConsistencyLoss(model), x, x + 0.2, target).ok
    register_rule(_Scale, lambda module, x, d: {"factor": 2 * x * d})
    try:
        engine = _TooSmall() if what == "engine" else "ghost"
        gc = GradientConsistencyLoss(model, engine=engine)
        report, checked = (run(gc, x, x + 0.2, target) for run in (diagnostics.verify, diagnostics.check))
    finally:
        unregister_rule(_Scale)
    if what == "rule":
        told = "UNPROVEN: registered rule of _Scale: test it with diagnostics.verify\nexact, by GhostEngine"
        assert str(checked).startswith(told)
    assert not report.ok
    assert report.worst <= report.tolerance < report.value_error
    assert "DISAGREE with those of engine='loop'" in str(report).splitlines()[0]
