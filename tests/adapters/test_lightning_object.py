"""The Lightning adapter: the object that it changes and gives back, and refusals by name."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from gradconsist import GradientConsistencyLoss, SSLBatch, StepOutput
from gradconsist.adapters import lightning as adapter
from gradconsist.errors import ConfigError, LossContractError, StateError
from support import training
from support.lightning_modules import Module, attached, fit

DATA = [SSLBatch(*batch) for batch in training.batches(2)]


# -- the object --------------------------------------------------------------------------------------------------------


def test_detach_restores_the_object_exactly() -> None:
    module = Module()

    def own(checkpoint: dict[str, Any]) -> None: ...

    module.on_save_checkpoint = own
    before = dict(vars(module))
    handle = adapter.attach(module, GradientConsistencyLoss(module.model))
    assert vars(module).keys() > before.keys()
    assert not [name for name in module.state_dict() if not name.startswith("model.")]
    handle.detach()
    assert dict(vars(module)) == before
    assert module.on_save_checkpoint is own
    handle.detach()
    adapter.attach(module, GradientConsistencyLoss(module.model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_takes_its_own_term_along(copied: Any) -> None:
    module, handle = attached(warmup_steps=0, ramp_steps=0, every=1)
    twin = copied(module)
    loss = twin.training_step(DATA[0], 0)
    mine = vars(twin)["training_step"].function.__self__
    assert (handle.step, mine.step) == (0, 1)
    assert mine.module is twin
    assert mine.wrapper.consistency.model is twin.model
    loss.backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in module.parameters())
    mine.detach()
    assert isinstance(twin.training_step(DATA[0], 0), StepOutput)


def test_a_handle_that_is_pickled_takes_its_module_along() -> None:
    _, handle = attached(warmup_steps=0)
    twin = pickle.loads(pickle.dumps(handle))
    twin.module.training_step(DATA[0], 0)
    assert (handle.step, twin.step) == (0, 1)
    twin.detach()
    assert isinstance(twin.module.training_step(DATA[0], 0), StepOutput)


# -- refusals ----------------------------------------------------------------------------------------------------------


class Twice(Module):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.output(batch))
        self.manual_backward(self.output(batch))


class Bare(Module):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.output(batch).loss.backward()
        self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)  # which leaves no trace in `_version`


class Late(Module):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.output(batch))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Twice, r"`manual_backward` was called a second time .* add up the losses"),
        (Late, r"`manual_backward` was called .*outside of it"),
        (Bare, r"`training_step` stepped an optimizer of the model without `self.manual_backward\(loss\)`"),
    ],
)
def test_manual_steps_whose_term_has_no_place(kind: type[Module], message: str) -> None:
    """From the first step on, though the warm-up has no term yet."""
    module = kind(manual=True)
    adapter.attach(module, GradientConsistencyLoss(module.model))
    with pytest.raises(LossContractError, match=message):
        fit(module, DATA[:2])


def test_observed_statistics_with_manual_optimization() -> None:
    module, _ = attached(manual=True, loss={"batchnorm": "observed"})
    with pytest.raises(ConfigError, match=r"`batchnorm='observed'` needs .*`batchnorm='auto'`"):
        fit(module, DATA[:1])


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_a_tuple_is_refused(manual: bool) -> None:
    module, _ = attached("tuple", manual=manual)
    where = "manual_backward" if manual else "training_step"
    with pytest.raises(LossContractError, match=rf"`{where}` has a tuple .*use a tensor"):
        fit(module, DATA[:1])


def test_a_step_without_a_pair_is_refused() -> None:
    module = Module("tensor")
    adapter.attach(module, GradientConsistencyLoss(module.model), warmup_steps=0)
    with pytest.raises(LossContractError, match="pair_fn"):
        fit(module, DATA[:1])


def test_what_cannot_be_attached() -> None:
    module, _ = attached()
    loss = GradientConsistencyLoss(module.model)
    with pytest.raises(ConfigError, match="`module` has a term attached already"):
        adapter.attach(module, loss)
    with pytest.raises(ConfigError, match=r"`module` is of type Sequential: pass a LightningModule"):
        adapter.attach(module.model, loss)
    with pytest.raises(ConfigError, match=r"`module` is of type function: pass a LightningModule"):
        adapter.attach(lambda: None, loss)
    with pytest.raises(ConfigError, match="`consistency` compares a model that `module` does not train"):
        adapter.attach(Module(), loss)
    with pytest.raises(ConfigError, match="`every`"):
        adapter.attach(Module(), loss, every=0)
    with pytest.raises(ConfigError, match="`module` is compiled: attach to the LightningModule"):
        adapter.attach(torch.compile(module, backend="eager"), loss)


def test_a_method_that_others_replaced_once_more() -> None:
    """As Lightning does with a compiled module: the term goes on, and detach waits until that is undone."""
    module, handle = attached()
    theirs = module.training_step
    module.training_step = functools.wraps(theirs)(lambda *args: theirs(*args))
    assert isinstance(module.training_step(DATA[0], 0), Tensor)
    assert handle.step == 1
    with pytest.raises(StateError, match=r"`module.training_step` was replaced after `attach` .* undo that"):
        handle.detach()
    module.training_step = theirs
    handle.detach()
    assert isinstance(module.training_step(DATA[0], 0), StepOutput)


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = attached()

    class DeepSpeedStrategy: ...

    class Trainer:
        strategy = DeepSpeedStrategy()

    monkeypatch.setattr(type(module), "trainer", Trainer(), raising=False)
    with pytest.raises(ConfigError, match="`strategy` is DeepSpeedStrategy"):
        module.training_step(DATA[0], 0)
