"""`batchnorm="observed"`: what convolutions returned in the method's own forwards is used where it serves.

It must never show in a number: wherever the method's forward was not the comparison's, the result is the loop's, which
recalls nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, StepOutput, ViewPair
from gradconsist.engines import GhostEngine
from gradconsist.methods import FixMatch
from support import compare
from support.oracle import Judge


class Net(nn.Module):
    """Three convolutions with BatchNorm; `between` is applied to what the second one gets."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1, bias=False) for c in (3, 4, 4))
        self.norm = nn.ModuleList(nn.BatchNorm2d(4) for _ in self.conv)
        self.head = nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.norm[0](self.conv[0](x)))
        x = x + self.norm[1](F.relu_(self.conv[1](x)))
        return self.head(torch.tanh(self.norm[2](self.conv[2](x))).mean((2, 3)))


class Short(Net):
    """The first convolution alone: no later one notices."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm[0](self.conv[0](x))).mean((2, 3)))


class Method(nn.Module):
    """Weak views alone, strong ones beside the labeled inputs; `middle` comes between the two, `after` at the end."""

    def __init__(self, model: Net, weak_mode: Any = contextlib.nullcontext, middle: Any = None, after: Any = None):
        super().__init__()
        self.model, self.weak_mode, self.middle, self.after = model, weak_mode, middle, after

    def forward(self, batch: SSLBatch) -> StepOutput:
        with self.weak_mode():
            label = self.model(batch.weak).argmax(1)
        if self.middle:
            self.middle(self.model)
        loss = self.model(torch.cat([batch.x, batch.strong])).square().mean()
        if self.after:
            self.after(self.model)
        return StepOutput(loss, ViewPair(batch.weak, batch.strong, label.clone()))


def _batch(dtype: torch.dtype = torch.float64) -> SSLBatch:
    x, weak, strong = torch.randn(2, 3, 6, 6), torch.randn(5, 3, 6, 6), torch.randn(5, 3, 6, 6)
    return SSLBatch(x.to(dtype), torch.tensor([0, 1]), weak.to(dtype), strong.to(dtype))


def _gradient(method: nn.Module, model: nn.Module, batch: SSLBatch, engine: Any = "ghost", **options: Any) -> Tensor:
    """Of the whole step, from the same random numbers."""
    torch.manual_seed(5)
    consistency = GradientConsistencyLoss(model, batchnorm="observed", engine=engine, chunk_size=2, **options)
    out = GGCRWrapper(method, consistency, warmup_steps=0, weight=1.0)(batch)
    assert out.pair is not None
    return compare.gradient_of(out.loss, model)


@pytest.mark.parametrize("joint", [True, False])
def test_convolutions_of_the_methods_own_forwards_are_recalled(joint: bool, recalls: list[bool]) -> None:
    model, batch = Net().double(), _batch()
    method = FixMatch(model, threshold=0.0, joint=joint)
    twin = copy.deepcopy(method)
    bare = compare.gradient_of(twin(batch).loss, twin)
    gradient = _gradient(method, model, batch) - bare
    views = torch.cat([batch.x, batch.weak, batch.strong])
    seen = (views, views) if joint else (batch.weak, torch.cat([batch.x, batch.strong]))
    target = model(views)[2:7].argmax(1) if joint else model(batch.weak).argmax(1)
    verdict = Judge(model, batch.weak, batch.strong, target, observed=seen[0], observed_strong=seen[1]).verdict()
    assert compare.relative(gradient, verdict.flat) <= 1e-8
    assert recalls == [True, False, True] * 3, "three chunks; the second convolution's output is overwritten"


def _scale(model: Net) -> None:
    model.conv[0].weight.data.mul_(2.0)  # `.data` tells no version


def _scale_back(model: Net) -> None:
    model.conv[0].weight.data.div_(2.0)


def _replaced(model: Net) -> None:
    model.conv[2].weight = nn.Parameter(model.conv[2].weight.detach() + 0.1)


@contextlib.contextmanager
def _no_gradient_and_autocast() -> Any:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


TROUBLE: dict[str, Callable[[], Method]] = {
    "weights_after": lambda: Method(Net(), after=_scale),
    "weights_between": lambda: Method(Net(), middle=_scale),
    "weights_between_only": lambda: Method(Net(), middle=_scale, after=_scale_back),
    "replaced": lambda: Method(Net(), after=_replaced),
    "inference_mode": lambda: Method(Net(), weak_mode=torch.inference_mode),
    "half": lambda: Method(Short(), weak_mode=_no_gradient_and_autocast),
    "dropout": lambda: Method(Net(between=nn.Dropout(0.5))),
    "made_weight": lambda: Method(_normalised()),
}


def _normalised() -> Net:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.conv[2])
    return model


@pytest.mark.parametrize("name", TROUBLE)
@pytest.mark.parametrize("max_pairs", [None, 3])
def test_other_forwards_change_nothing(name: str, max_pairs: int | None) -> None:
    torch.manual_seed(0)
    method, batch = TROUBLE[name]().double(), _batch()
    if name == "half":  # autocast leaves float64 alone; inputs that bfloat16 holds exactly look the same
        method, batch = method.float(), _batch(torch.float32)
        batch = batch._replace(weak=batch.weak.round())
    twin = copy.deepcopy(method)
    mine = _gradient(method, method.model, batch, max_pairs=max_pairs)
    loop = _gradient(twin, twin.model, batch, engine="loop", max_pairs=max_pairs)
    assert compare.relative(mine, loop) <= (2e-4 if name == "half" else 1e-8)


def test_a_forward_that_was_another_one_is_asked_once(recalls: list[bool]) -> None:
    """With dropout in the method and not in the comparison: the third convolution of the first chunk ends it."""
    method = Method(Net(between=nn.Dropout(0.5))).double()
    _gradient(method, method.model, _batch())
    assert recalls == [True, False, False]


def test_what_is_kept_has_a_limit(recalls: list[bool]) -> None:
    for limit in (0, 100, 2**12):
        method = Method(Net()).double()
        _gradient(method, method.model, _batch(), engine=GhostEngine(recall_bytes=limit))
    assert not recalls
