"""A device without float64, as MPS and some XPUs are: the same numbers, or a refusal that says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, diagnostics
from gradconsist._inputs.precision import has_float64
from gradconsist.errors import DeviceError, UnsupportedModuleError
from support import compare, methods
from support.models import Layers
from support.simulated_gpu import SimulatedGPU
from support.zoo import CASES

from .devices import move, on_both


@pytest.fixture(autouse=True)
def narrow(gpu: SimulatedGPU | None) -> Iterator[None]:
    """The simulated device loses its float64."""
    if gpu is None or "SIMULATED_GPU" not in os.environ:
        pytest.skip("only the simulated device can lack float64")
    gpu.float64 = False
    has_float64.cache_clear()
    yield
    has_float64.cache_clear()


def test_the_device_has_none() -> None:
    assert has_float64(torch.device("cpu"))
    assert not has_float64(torch.device("cuda", 0))
    with pytest.raises(TypeError, match="does not support float64"):
        torch.ones(2, device="cuda").double()


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("mlp_soft_target", "loop"),
        ("cnn_batchnorm_train", "vmap"),
        ("cnn_batchnorm_train", "ghost"),
        ("vit_dropout", "ghost"),
        ("text_dict", "ghost"),
    ],
)
def test_the_loss(name: str, engine: str) -> None:
    def run(device: str) -> Any:
        problem = CASES[name].problem(dtype=torch.float32, pairs=3)
        loss = GradientConsistencyLoss(problem.model.to(device), engine=engine)
        value = loss(*(move(view, device) for view in problem.views))
        value.backward()
        parts = [p.grad.flatten() for p in compare.trainable(problem.model) if p.grad is not None]
        return [value, loss.last.cosine, torch.cat(parts)]

    expected, found = on_both(run)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_the_methods(name: str) -> None:
    def run(device: str) -> Any:
        torch.manual_seed(5)
        model = methods.network().float().to(device)
        method = methods.METHODS[name](model)
        wrapper = GGCRWrapper(method, GradientConsistencyLoss(model, max_pairs=4), weight=0.5, warmup_steps=0)
        losses = []
        for batch in methods.data(1):
            parts = (part.float() if part.is_floating_point() else part for part in batch)
            losses.append(wrapper(SSLBatch(*(part.to(device) for part in parts))).loss)
        return losses

    expected, found = on_both(run)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class Detached(torch.autograd.Function):
    """Square, whose backward hides how its derivative depends on x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach().clone()
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.x * grad


def test_a_wrong_second_derivative_is_still_found() -> None:
    """It is measured in float64, on the CPU if need be."""
    model = nn.Sequential(nn.Linear(5, 4), Layers(lambda _, x: Detached.apply(x)), nn.Linear(4, 3)).cuda()
    views = torch.randn(4, 5).cuda(), torch.randn(4, 5).cuda(), torch.zeros(4, dtype=torch.long).cuda()
    with pytest.raises(UnsupportedModuleError, match="wrong second derivative"):
        GradientConsistencyLoss(model, engine="loop")(*views)


def test_what_needs_float64_says_so() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).cuda()
    loss = GradientConsistencyLoss(model)
    views = torch.randn(4, 5).cuda(), torch.randn(4, 5).cuda(), torch.zeros(4, dtype=torch.long).cuda()
    for call in (diagnostics.verify, diagnostics.consistency_bound):
        with pytest.raises(DeviceError, match="runs in float64, which cuda:0 does not have: move model and inputs"):
            call(loss, *views)
    with pytest.raises(DeviceError, match="runs in float64, which cuda:0 does not have: move model and inputs"):
        diagnostics.check_rule(nn.Linear(5, 3).cuda(), views[0])
