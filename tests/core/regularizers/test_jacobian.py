"""JacobianPenalty against explicit Jacobians, and its random projections against their expectation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist.errors import (
    GradModeError,
    InputShapeError,
    InputTypeError,
    InputValueError,
    LossContractError,
    NonFiniteError,
    StateError,
    UnsupportedModuleError,
)
from gradconsist.regularizers import JacobianPenalty
from support import compare


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(3 * 4, 3)
    ).double()


SHAPES = {mlp: (5, 4), cnn: (5, 1, 4, 4)}


def affine(layer: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
    wide = lambda v: v.view(1, -1, 1, 1)  # noqa: E731
    return lambda y: (y - wide(mean)) / wide(variance + layer.eps).sqrt() * wide(layer.weight) + wide(layer.bias)


def by_definition(model: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """1/B sum of weight ||dz/dx||^2 from whole Jacobians of single samples; BatchNorm written out."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(layer, nn.BatchNorm2d):
            with torch.no_grad():
                seen = model[0](x)
            mean, variance = seen.mean((0, 2, 3)), seen.var((0, 2, 3), unbiased=False)
            if not layer.training:
                mean, variance = layer.running_mean.clone(), layer.running_var.clone()
            layer.forward = affine(layer, mean, variance)
    total = torch.zeros((), dtype=torch.float64)
    for i, factor in enumerate(weight):
        jacobian = torch.autograd.functional.jacobian(
            lambda one: model(one.unsqueeze(0)).squeeze(0), x[i], create_graph=True
        )
        total = total + factor * jacobian.square().sum()
    loss = total / len(x)
    return loss.detach(), torch.cat([part.reshape(-1) for part in _gradients(loss, model)])


def _gradients(loss: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [mlp, cnn])
def test_the_exact_sum(build: Callable[[], nn.Module], training: bool) -> None:
    model = build().train(training)
    before = copy.deepcopy(model.state_dict())
    x, weight = torch.randn(SHAPES[build], dtype=torch.float64), torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0]).double()
    loss, gradient = by_definition(model, x, weight)
    state = torch.get_rng_state()
    found = JacobianPenalty(model, projections=None)(x, weight)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(found.detach(), loss, rtol=1e-10, atol=0.0)
    assert compare.relative(compare.gradient_of(found, model), gradient) <= 1e-8
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert x.grad is None
    assert not x.requires_grad


def test_projections_are_unbiased_in_value_and_gradient() -> None:
    """Means of 400 draws lie within 4 standard errors of the exact sum; more projections have less variance."""
    model = mlp()
    x, weight = torch.randn(5, 4, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    loss, gradient = by_definition(model, x, weight)
    v = torch.randn(len(gradient), dtype=torch.float64)  # one direction of the gradient

    def draws(projections: int, count: int) -> Tensor:
        penalty = JacobianPenalty(model, projections=projections)
        rows = []
        for _ in range(count):
            found = penalty(x)
            rows.append(torch.stack([found.detach(), compare.gradient_of(found, model) @ v]))
        return torch.stack(rows)

    one, four = draws(1, 400), draws(4, 150)
    exact = torch.stack([loss, gradient @ v])
    for sample in (one, four):
        assert bool(((sample.mean(0) - exact).abs() <= 4 * sample.std(0) / len(sample) ** 0.5).all())
    assert 2.5 <= float((one.var(0) / four.var(0))[0]) <= 6.0


def test_one_output_needs_one_projection() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    exact = JacobianPenalty(model, projections=None)(x)
    torch.testing.assert_close(JacobianPenalty(model)(x), exact, rtol=1e-10, atol=0.0)


def test_the_seed_decides_and_the_state_continues() -> None:
    model, x = mlp(), torch.randn(5, 4, dtype=torch.float64)
    first, second = JacobianPenalty(model, seed=3), JacobianPenalty(model, seed=3)
    values = [float(first(x).detach()) for _ in range(3)]
    assert float(second(x).detach()) == values[0]
    state = second.state_dict()
    assert [float(second(x).detach()) for _ in range(2)] == values[1:]
    second.load_state_dict(state)
    assert float(copy.deepcopy(second)(x).detach()) == values[1]
    assert float(second(x).detach()) == values[1]
    given = [float(first(x, generator=torch.Generator().manual_seed(5)).detach()) for _ in range(2)]
    assert given[0] == given[1] != values[0]
    torch.manual_seed(0)
    assert float(first(x, generator=torch.default_generator).detach()) > 0


def test_inputs_of_several_tensors_and_another_output() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Embedding(5, 3)

        def forward(self, image: Tensor, token: Tensor, mask: None, on: bool) -> dict[str, Tensor]:
            assert mask is None
            assert on is True
            z = torch.tanh(self.a(image) + self.b(token))
            return {"logits": z, "features": 2 * z}

    torch.manual_seed(0)
    model = Two()
    inputs = {"mask": None, "image": torch.randn(5, 4), "on": True, "token": torch.arange(5)}
    logits = JacobianPenalty(model, projections=None)(inputs)
    features = JacobianPenalty(model, projections=None, output_fn=lambda output: output["features"])(inputs)
    torch.testing.assert_close(features, 4 * logits)
    with pytest.raises(InputTypeError, match="`inputs` has no floating tensor"):
        JacobianPenalty(model)({"image": torch.arange(5), "token": torch.arange(5)})


class Mixing(nn.Module):
    """Each sample sees its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(x - x.mean(0)))


def test_bad_calls() -> None:
    model, x = mlp().float(), torch.randn(5, 4)
    penalty = JacobianPenalty(model)
    with pytest.raises(InputTypeError, match="`inputs` holds no tensor"):
        penalty([1, 2])
    with pytest.raises(InputShapeError, match="`weight` has shape"):
        penalty(x, torch.ones(4))
    with pytest.raises(InputValueError, match="`weight` has the negative entry"):
        penalty(x, -torch.ones(5))
    with pytest.raises(NonFiniteError, match="the Jacobian penalty is NaN or infinite"):
        penalty(x * torch.nan)
    with torch.no_grad(), pytest.raises(GradModeError, match="JacobianPenalty was called where no graph"):
        penalty(x)
    with pytest.raises(LossContractError, match="expected a floating tensor with"):
        JacobianPenalty(model, output_fn=lambda z: z.sum())(x)
    with pytest.raises(UnsupportedModuleError, match="changes with the other samples of the batch"):
        JacobianPenalty(Mixing())(x)
    with pytest.raises(StateError, match="not that of a JacobianPenalty"):
        penalty.load_state_dict({"seed": torch.zeros(1)})


def test_a_function_without_a_second_derivative_is_refused() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            return 2 * upstream * ctx.saved_tensors[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.linear(x))

    with pytest.raises(UnsupportedModuleError, match="second derivative"):
        JacobianPenalty(Model())(torch.randn(5, 4))


class StandardisedWeight(nn.Module):
    """A convolution whose weight is standardised, by `F.batch_norm` as timm does it or by the formula."""

    def __init__(self, *, formula: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.formula = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), formula

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv.weight.reshape(1, 4, -1)
        if self.formula:
            rows = (rows - rows.mean(2, keepdim=True)) / (rows.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        else:
            rows = F.batch_norm(rows, None, None, training=True)
        return self.norm(F.conv2d(x, rows.view_as(self.conv.weight), self.conv.bias)).square().mean((2, 3))


def test_weight_standardisation_keeps_its_derivative() -> None:
    x, gradients = torch.randn(3, 1, 5, 5, dtype=torch.float64), []
    for formula in (True, False):
        torch.manual_seed(0)
        model = StandardisedWeight(formula=formula).double()
        gradients.append(compare.gradient_of(JacobianPenalty(model)(x), model))
    assert compare.relative(gradients[1], gradients[0]) <= 1e-8


def test_the_statistics_of_one_sample_are_constants() -> None:
    """(y / x of a BatchNorm with constant statistics) is a fixed scale."""
    norm = nn.BatchNorm2d(1, affine=False).double()
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    expected = 9 / (x.var(correction=0) + norm.eps)
    conv = nn.Conv2d(1, 1, 1, bias=False).double()
    with torch.no_grad():
        conv.weight.fill_(1.0)
    found = JacobianPenalty(nn.Sequential(conv, norm))(x)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("cut", [Tensor.detach, Tensor.sign])
def test_an_output_without_a_derivative_for_the_input_is_refused(cut: Callable[[Tensor], Tensor]) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(cut(x))

    with pytest.raises(UnsupportedModuleError, match="no derivative for its inputs"):
        JacobianPenalty(Cut())(torch.randn(4, 3))
