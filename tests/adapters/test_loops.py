"""One method in every kind of training loop: the same parameters after 20 steps, to the last bit.

Accelerate and Fabric need no adapter: they are given the wrapper, as any module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning import fabric
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, StepOutput, ViewPair
from gradconsist.adapters import lightning as adapter
from support import training
from support.lightning_modules import Module, fit, loader, loop, same, sgd

DATA = [SSLBatch(*batch) for batch in training.batches(20)]
OPTIONS = {"weight": 0.3, "warmup_steps": 3, "ramp_steps": 5}
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _no_accelerate_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def build(method: Callable[..., Any] | None = None, module: Module | None = None, **options: Any) -> GGCRWrapper:
    """The wrapper around FixMatch by hand, whose model is the same each time."""
    torch.manual_seed(0)
    module = module or Module()
    loss = GradientConsistencyLoss(module.model, max_pairs=4)
    return GGCRWrapper(method or Method(module), loss, **(OPTIONS | options))


class Method(nn.Module):
    def __init__(self, module: Module) -> None:
        super().__init__()
        self.model, self.output = module.model, module.output

    def forward(self, batch: SSLBatch) -> StepOutput:
        return self.output(batch)


def plain() -> State:
    wrapper = build()
    return loop(lambda batch: wrapper(batch).loss, wrapper.method.model, DATA)


def function() -> State:
    """A plain function that returns a tuple, the pair by `pair_fn`."""
    module = Module("tuple")
    wrapper = build(module.output, module, pair_fn=lambda args, kwargs, out: module.pair(args, kwargs, out))
    return loop(lambda batch: wrapper(batch).loss, module.model, DATA)


def mapping() -> State:
    module = Module("mapping")

    def pair_fn(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> ViewPair:
        return ViewPair(args[0].weak, args[0].strong, output["label"], output["mask"])

    wrapper = build(module.output, module, pair_fn=pair_fn)
    return loop(lambda batch: wrapper(batch).loss, module.model, DATA)


def with_accelerate() -> State:
    accelerator = Accelerator(cpu=True)
    wrapper = build()
    step, optimizer, data = accelerator.prepare(wrapper, sgd(wrapper.parameters()), loader(DATA))
    for number, batch in enumerate(data):
        if number == 0:
            torch.manual_seed(5)
        optimizer.zero_grad()
        accelerator.backward(step(batch).loss)
        optimizer.step()
    assert accelerator.unwrap_model(step) is wrapper
    return wrapper.method.model.state_dict()


def with_fabric() -> State:
    it = fabric.Fabric(accelerator="cpu", devices=1)
    wrapper = build()
    step, optimizer = it.setup(wrapper, sgd(wrapper.parameters()))
    data = it.setup_dataloaders(loader(DATA))
    for number, batch in enumerate(data):
        if number == 0:
            torch.manual_seed(5)
        optimizer.zero_grad()
        it.backward(step(batch).loss)
        optimizer.step()
    return wrapper.method.model.state_dict()


class Holding(Module):
    """A LightningModule that calls a wrapper itself; no adapter."""

    def __init__(self, *, manual: bool = False) -> None:
        super().__init__(manual=manual)
        self.method = build(Method(self), self)

    def training_step(self, batch: SSLBatch, batch_idx: int) -> Tensor | None:
        loss = self.method(batch).loss
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


def holding(*, manual: bool) -> State:
    module = Holding(manual=manual)
    fit(module, DATA)
    return module.model.state_dict()


def fabric_with_a_lightning_module() -> State:
    it = fabric.Fabric(accelerator="cpu", devices=1)
    module = Module()
    torch.manual_seed(0)
    adapter.attach(module, GradientConsistencyLoss(module.model, max_pairs=4), **OPTIONS)
    step, optimizer = it.setup(module, sgd(module.parameters()))
    for number, batch in enumerate(it.setup_dataloaders(loader(DATA))):
        if number == 0:
            torch.manual_seed(5)
        optimizer.zero_grad()
        it.backward(step.training_step(batch, number))
        optimizer.step()
    return module.model.state_dict()


LOOPS: dict[str, Callable[[], State]] = {
    "a function that returns a tuple": function,
    "a function that returns a mapping": mapping,
    "Accelerate": with_accelerate,
    "Fabric": with_fabric,
    "Fabric with a LightningModule": fabric_with_a_lightning_module,
    "Lightning around the wrapper, automatic": lambda: holding(manual=False),
    "Lightning around the wrapper, manual": lambda: holding(manual=True),
}


@pytest.fixture(scope="module")
def expected() -> State:
    return plain()


@pytest.mark.parametrize("run", LOOPS.values(), ids=LOOPS)
def test_the_same_parameters_after_twenty_steps(run: Callable[[], State], expected: State) -> None:
    assert same(run(), expected)
    assert not same(Module().model.state_dict(), expected)


def test_the_term_matters(expected: State) -> None:
    """The loops above would agree without it, too."""
    wrapper = build(weight=0.0)
    assert not same(loop(lambda batch: wrapper(batch).loss, wrapper.method.model, DATA), expected)
