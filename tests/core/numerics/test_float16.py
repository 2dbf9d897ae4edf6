"""Float16, whose range is short at both ends: N6 of the test plan, and derivatives spread over many entries."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist.methods import FixMatch
from support import compare, training
from support.oracle import Judge, Verdict

ENGINES = pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])


@functools.cache
def verdicts(sharpness: float) -> tuple[Verdict, Verdict]:
    """The exact one, and that of a plain loop under the same autocast, which scales nothing."""
    problem = wide_model(sharpness)
    return Judge(*problem).verdict(), Judge(*problem, dtype=torch.float32, autocast=torch.float16).verdict()


def wide_model(sharpness: float) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """136,000 parameters and 16 pairs: an entry of the derivative for a gradient is 1e-8 of what a float holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 10))
    with torch.no_grad():
        model[2].weight.mul_(sharpness)
        weak = torch.randn(16, 256)
        target = model(weak).argmax(1)
    return model, weak, weak + 0.5 * torch.randn(16, 256), target


@FUSED
@ENGINES
@pytest.mark.parametrize("sharpness", [1.0, 20.0])
def test_the_gradient_under_float16_autocast(sharpness: float, engine: str, fused: bool) -> None:
    """Within twice the error of a plain loop under the same autocast."""
    (model, *pairs), (exact, plain) = wide_model(sharpness), verdicts(sharpness)
    gc = GradientConsistencyLoss(model, engine=engine, fused=fused)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = gc(*pairs)
    gradient = compare.gradient_of(loss, model)
    assert torch.equal(gc.last.degenerate, exact.degenerate)
    theirs = compare.cosine_error(plain.cosine, exact.cosine)
    assert compare.cosine_error(gc.last.cosine, exact.cosine) <= 2 * theirs + 1e-3
    assert compare.relative(gradient, exact.flat) <= 2 * compare.relative(plain.flat, exact.flat) + 2e-3


@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e6])
def test_the_gradient_does_not_depend_on_the_size_of_the_weights(weight: float) -> None:
    """Weights, and reduction by the sum, move the derivative through the whole range of float16."""
    model, *pairs = wide_model(1.0)
    gc = GradientConsistencyLoss(model, reduction="sum")
    with torch.autocast("cpu", dtype=torch.float16):
        loss = gc(*pairs, torch.full([16], weight))
    exact = 16 * weight * verdicts(1.0)[0].flat
    assert compare.relative(compare.gradient_of(loss, model), exact) <= 5e-3


class Steps:
    """FixMatch with the term under float16 autocast, a GradScaler, and an average of the weights of steps taken."""

    def __init__(self, scale: float) -> None:
        self.method = FixMatch(training.network(dropout=0.0), threshold=0.37)
        self.wrapper = GGCRWrapper(self.method, GradientConsistencyLoss(self.method.model), weight=0.5, warmup_steps=0)
        self.optimizer = torch.optim.SGD(self.wrapper.parameters(), lr=0.05)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        self.average = copy.deepcopy(self.method.model)
        self.taken = 0

    def __call__(self, batch: SSLBatch, *, overflow: bool = False) -> float:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            out = self.wrapper(batch)
        scale = self.scaler.get_scale()
        self.scaler.scale(out.loss * (torch.inf if overflow else 1.0)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:
            self.taken += 1
            with torch.no_grad():
                for mean, now in zip(self.average.parameters(), self.method.model.parameters(), strict=True):
                    mean.lerp_(now, 0.5)
        return float(out.logs["ggcr_loss"])

    def state(self) -> list[Tensor]:
        both = [*self.method.model.parameters(), *self.average.parameters()]
        return [parameter.detach().clone() for parameter in both]


DATA = [SSLBatch(*batch) for batch in training.batches(4)]


def test_n06_the_value_does_not_depend_on_the_scale_of_the_loss() -> None:
    """2^16, as GradScaler starts, and 1: bit for bit the same term, and the same parameters to rounding."""
    first, second = Steps(2.0**16), Steps(1.0)
    assert first(DATA[0]) == second(DATA[0])
    for batch in DATA[1:]:
        assert first(batch) == pytest.approx(second(batch), rel=1e-2)
    assert first.taken == second.taken == 4
    assert first.scaler.get_scale() == 2.0**16
    for a, b in zip(first.state(), second.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=2e-3)


def test_n06_a_forced_overflow_skips_the_step() -> None:
    """The term is what it is; the step is not taken, the scale halves, the average stays; the next step is ordinary."""
    steps = Steps(2.0**16)
    steps(DATA[0])
    before, value = steps.state(), steps(DATA[1], overflow=True)
    assert all(torch.equal(a, b) for a, b in zip(before, steps.state(), strict=True))
    assert steps.scaler.get_scale() == 2.0**15
    assert steps.taken == 1
    again = steps(DATA[1])
    assert again == value  # FixMatch's BatchNorm has seen the batch once more; ours uses the statistics of the call
    assert steps.taken == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, steps.state(), strict=True))


@FUSED
@ENGINES
@pytest.mark.parametrize("size", [100.0, 3000.0])
def test_gradients_that_are_large_are_compared_too(size: float, engine: str, fused: bool) -> None:
    """Gradients of 100 and 3,000 times the usual size, which the private loss scale would push beyond float16."""
    model, weak, strong, target = wide_model(1.0)
    with torch.no_grad():
        model[0].weight.div_(size)
    pairs = weak * size, strong * size, target
    exact = Judge(model, *pairs).verdict()
    gc = GradientConsistencyLoss(model, engine=engine, fused=fused)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = gc(*pairs)
    assert not gc.last.degenerate.any()
    assert compare.relative(gc.last.norm_weak, exact.norm_weak) <= 1e-2
    assert compare.cosine_error(gc.last.cosine, exact.cosine) <= 1e-2
    if fused:  # else the derivatives' range is a matter of the user's own GradScaler
        assert compare.relative(compare.gradient_of(loss, model), exact.flat) <= 5e-2


def test_n06_an_overflow_inside_the_term_is_counted_and_stays_inside() -> None:
    """A pair whose gradient is beyond float16 is left out; the step is taken with the others."""
    steps = Steps(2.0**16)
    batch = DATA[0]
    strong = batch.strong.clone()
    strong[0] *= 1e6
    gc = steps.wrapper.consistency
    with torch.autocast("cpu", dtype=torch.float16):
        loss = GradientConsistencyLoss(gc.model, batchnorm="running")(batch.weak, strong, torch.arange(6) % 3)
        rest = GradientConsistencyLoss(gc.model, batchnorm="running", reduction="sum")(
            batch.weak[1:], strong[1:], (torch.arange(6) % 3)[1:]
        )
    assert float(loss.detach()) == pytest.approx(float(rest.detach()) / 6, rel=1e-5)
    assert torch.isfinite(compare.gradient_of(loss, gc.model)).all()
