"""Sharpness and the top eigenvalue against a dense float64 Hessian and the loss written out, on small models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradconsist.diagnostics import sharpness, top_eigenvalue
from gradconsist.errors import (
    InputShapeError,
    NonFiniteError,
    ParameterSelectionError,
    UnsupportedModuleError,
)
from support.models import SquareOnce

Batch = tuple[nn.Module, Tensor, Tensor]


def mlp() -> Batch:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    return model, torch.randn(9, 4, dtype=torch.float64), torch.randint(3, [9])


def normalised() -> Batch:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    for _ in range(5):
        model(1.0 + 2.0 * torch.randn(9, 4, dtype=torch.float64))
    return model, torch.randn(9, 4, dtype=torch.float64), torch.randint(3, [9])


def loss_by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Mean cross-entropy as a function of the flat weights; BatchNorm by constants, dropout off."""
    model = copy.deepcopy(model)
    if isinstance(model[1], nn.BatchNorm1d):
        norm, seen = model[1], model[0](x).detach()
        mean, var = norm.running_mean, norm.running_var
        if norm.training:
            mean, var = seen.mean(0), seen.var(0, unbiased=False)
        norm.forward = lambda z: (z - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    else:
        model[2].p = 0.0
    shapes = [(name, p.shape) for name, p in model.named_parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for _, shape in shapes])
        tensors = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        z = functional_call(model, tensors, (x,))
        return (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).mean()

    return loss


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [mlp, normalised])
def test_the_top_eigenvalue_is_the_dense_hessians(
    build: Callable[[], Batch], training: bool, chunk_size: int | None
) -> None:
    model, x, y = build()
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    hessian = torch.autograd.functional.hessian(loss_by_hand(model, x, y), flat(model))
    exact = float(torch.linalg.eigvalsh(hessian)[-1])
    report = top_eigenvalue(model, x, y, tolerance=1e-8, chunk_size=chunk_size)
    assert report.converged
    assert abs(report.value - exact) <= 1e-8 * abs(exact)
    v = report.vector
    assert abs(float((hessian @ v - report.value * v).norm()) / abs(report.value) - report.residual) <= 1e-8
    assert abs(float(v.norm()) - 1) <= 1e-12
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_few_steps_say_so() -> None:
    model, x, y = mlp()
    report = top_eigenvalue(model, x, y, max_steps=2, tolerance=1e-8)
    assert not report.converged
    assert report.residual > 1e-8
    assert report.steps == 3
    assert "NOT CONVERGED" in str(report)


def test_the_largest_and_not_the_largest_absolute() -> None:
    """-cos-like bowl upside down: the eigenvalue of largest magnitude is negative, the top one is not."""

    class Saddle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.w.square() * torch.tensor([-5.0, 1.0, 2.0])).sum()

    report = top_eigenvalue(
        Saddle(), torch.ones(2, 1, dtype=torch.float64), torch.zeros(2), loss_fn=lambda z, t: z.squeeze(1)
    )
    assert abs(report.value - 4.0) <= 1e-6


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature() -> None:
    model = nn.Linear(3, 1).double()
    report = top_eigenvalue(
        model, torch.randn(4, 3, dtype=torch.float64), torch.zeros(4), loss_fn=lambda z, t: z.squeeze(1)
    )
    assert (report.value, report.residual, report.converged) == (0.0, 0.0, True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [mlp, normalised])
def test_one_ascent_step_is_sams(build: Callable[[], Batch], training: bool) -> None:
    model, x, y = build()
    model.train(training)
    loss, w = loss_by_hand(model, x, y), flat(model).requires_grad_()
    (g,) = torch.autograd.grad(loss(w), w)
    report = sharpness(model, x, y, rho=0.2, chunk_size=4)
    assert abs(report.loss - float(loss(w).detach())) <= 1e-12
    assert abs(report.worst - float(loss(w + 0.2 * g / g.norm()).detach())) <= 1e-12
    assert abs(report.gradient_norm - float(g.norm())) <= 1e-12
    assert report.sharpness > 0


def test_more_steps_stay_in_the_ball_and_find_no_less() -> None:
    model, x, y = mlp()
    one, many = (sharpness(model, x, y, rho=2.0, ascent_steps=steps) for steps in (1, 8))
    assert many.path[0] == one.worst
    assert many.worst >= one.worst
    # Of 4,000 random points on the sphere, none is worse than what eight steps find.
    loss, w = loss_by_hand(model, x, y), flat(model)
    v = torch.randn(4000, len(w), dtype=torch.float64)
    sampled = torch.func.vmap(loss)(w + 2.0 * v / v.norm(dim=1, keepdim=True))
    assert many.worst >= float(sampled.max())
    # And a long ascent in the same ball is little better.
    e = torch.zeros_like(w)
    for _ in range(500):
        at = (w + e).requires_grad_()
        (g,) = torch.autograd.grad(loss(at), at)
        e = e + 0.2 * g / g.norm()
        e = e * min(1.0, 2.0 / float(e.norm()))
    best = float(loss(w + e))
    assert many.worst <= best + 1e-6
    assert many.worst >= 0.9 * best


def test_a_subset_of_the_parameters() -> None:
    model, x, y = mlp()
    loss, w = loss_by_hand(model, x, y), flat(model)
    count = sum(p.numel() for p in model[0].parameters())
    hessian = torch.autograd.functional.hessian(loss, w)[:count, :count]
    report = top_eigenvalue(model, x, y, parameters=model[0], tolerance=1e-8)
    assert abs(report.value - float(torch.linalg.eigvalsh(hessian)[-1])) <= 1e-8


def test_constants_are_passed_on() -> None:
    class Switched(nn.Module):
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor, mask: None, on: bool) -> Tensor:
            return self.layers(x if on and mask is None else 0 * x)

    model, x, y = mlp()
    assert sharpness(Switched(model), (x, None, True), y) == sharpness(model, x, y)


def test_float32_reaches_its_tolerance() -> None:
    model, x, y = mlp()
    exact = top_eigenvalue(model, x, y, tolerance=1e-8).value
    report = top_eigenvalue(model.float(), x.float(), y)
    assert report.converged
    assert abs(report.value - exact) <= 1e-3 * exact


def test_a_function_without_a_second_derivative_is_refused() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return SquareOnce.apply(self.linear(x))

    with pytest.raises(UnsupportedModuleError, match="without a second derivative"):
        top_eigenvalue(Last(), mlp()[1], torch.zeros(9), loss_fn=lambda z, t: z.sum(1))


def test_inputs_made_under_inference_mode() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.arange(6) % 3
    with torch.inference_mode():
        inference = x.clone()
    assert sharpness(model, inference, y) == sharpness(model, x, y)
    assert top_eigenvalue(model, inference, y).value == top_eigenvalue(model, x, y).value


def test_bad_arguments() -> None:
    model, x, y = mlp()
    with pytest.raises(InputShapeError, match=r"`target` has shape \(8,\)"):
        sharpness(model, x, y[:8])
    with pytest.raises(NonFiniteError, match="the mean loss is nan"):
        sharpness(model, x * torch.nan, y)
    with pytest.raises(ParameterSelectionError, match="selects none"):
        top_eigenvalue(model, x, y, parameters=lambda name: False)


def test_one_large_eigenvalue_among_many_equal_ones_is_found() -> None:
    """A start that hardly holds its vector looks converged at once, at the wrong eigenvalue."""

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(200_000))
            self.register_buffer("d", torch.ones(200_000).index_fill(0, torch.tensor([7]), 1.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (0.5 * self.d * self.w.square()).sum() * x.squeeze(1)

    report = top_eigenvalue(Quadratic(), torch.ones(1, 1), torch.zeros(1), loss_fn=lambda output, _: output)
    assert report.value == pytest.approx(1.5, rel=1e-3)


def test_an_eigenvalue_of_nan_is_refused() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        top_eigenvalue(model, torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
