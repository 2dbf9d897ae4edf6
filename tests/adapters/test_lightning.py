"""The Lightning adapter: bitwise a plain loop with GGCRWrapper, and an exact resume."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist.adapters import lightning as adapter
from gradconsist.errors import GradModeError, StateError
from gradconsist.methods import FixMatch
from support import training
from support.compare import relative
from support.lightning_modules import OPTIONS, THRESHOLD, Module, attached, fit, loader, loop, same
from support.oracle import Judge

DATA = [SSLBatch(*batch) for batch in training.batches(20)]


def wrapped(*, loss: dict[str, Any] | None = None, **options: Any) -> tuple[nn.Module, GGCRWrapper]:
    """The same in plain torch."""
    torch.manual_seed(0)  # the loss's own generator takes its seed from here
    model = training.network(dropout=options.pop("dropout", 0.2))
    method = FixMatch(model, threshold=THRESHOLD)
    return model, GGCRWrapper(method, GradientConsistencyLoss(model, **(loss or {})), **(OPTIONS | options))


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("form", ["output", "tensor", "mapping"])
def test_training_is_bitwise_that_of_a_plain_loop(form: str, manual: bool) -> None:
    module, handle = attached(form, manual=manual, loss={"max_pairs": 3})
    done = fit(module, DATA[:10])
    model, wrapper = wrapped(loss={"max_pairs": 3})
    expected = loop(lambda b: wrapper(b).loss, model, DATA[:10])
    assert same(module.model.state_dict(), expected)
    assert handle.step == wrapper.step == 10
    logged = {"ggcr_weight", "ggcr_loss", "ggcr_cosine", "ggcr_degenerate", "ggcr_pairs"}
    assert done.callback_metrics.keys() == logged | ({"mask"} if form == "output" else set())
    assert float(done.callback_metrics["ggcr_pairs"]) == 3


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_the_gradient_is_base_plus_weight_times_term(manual: bool) -> None:
    """Against the oracle, which shares no code with library or Lightning."""
    module, _ = attached(manual=manual, dropout=0.0, weight=0.7, warmup_steps=0, ramp_steps=0, every=1)
    module.double()
    batch = SSLBatch(*(v.double() if v is not None and v.is_floating_point() else v for v in DATA[0]))
    twin = copy.deepcopy(module.model)
    base, label, mask = training.plain_fixmatch(twin, batch, THRESHOLD)
    base.backward()
    verdict = Judge(twin, batch.weak, batch.strong, label, mask).verdict()
    expected = torch.cat([p.grad.reshape(-1) for p in twin.parameters()]) + 0.7 * verdict.flat
    fit(module, [batch])
    assert relative(torch.cat([p.grad.reshape(-1) for p in module.model.parameters()]), expected) <= 1e-8


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("options", [{"weight": 0.0}, {"warmup_steps": 6}], ids=["weight 0", "warm-up"])
def test_inactive_it_is_bitwise_the_plain_module(options: dict[str, Any], manual: bool) -> None:
    plain = Module("tensor", manual=manual)
    fit(plain, DATA[:6])
    module, handle = attached("tensor", manual=manual, **options)
    count = training.Counter(module.model)
    fit(module, DATA[:6])
    assert same(module.state_dict(), plain.state_dict())
    assert handle.step == 6
    assert (count.calls == 6) == ("weight" in options), "no extra forward but those of the first step's trial"


def test_observed_statistics_with_automatic_optimization() -> None:
    module, _ = attached(loss={"batchnorm": "observed"})
    fit(module, DATA[:6])
    model, wrapper = wrapped(loss={"batchnorm": "observed"})
    assert same(module.model.state_dict(), loop(lambda b: wrapper(b).loss, model, DATA[:6]))


def test_accumulated_gradients_count_every_micro_batch() -> None:
    module, handle = attached()
    fit(module, DATA[:12], accumulate_grad_batches=3)
    model, wrapper = wrapped()
    assert same(module.model.state_dict(), loop(lambda b: wrapper(b).loss, model, DATA[:12], accumulate=3))
    assert handle.step == 12


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_mixed_precision(manual: bool) -> None:
    module, _ = attached(manual=manual)
    fit(module, DATA[:6], precision="bf16-mixed")
    twin = Module()
    wrapper = GGCRWrapper(twin.output, GradientConsistencyLoss(twin.model), **OPTIONS)

    def step(batch: SSLBatch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return wrapper(batch).loss

    assert same(module.model.state_dict(), loop(step, twin.model, DATA[:6]))


class Skipping(Module):
    """Leaves out every third batch; takes the batch alone, as Lightning allows."""

    def training_step(self, batch: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return None if self.calls % 3 == 0 else super().training_step(batch, 0)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")
def test_a_skipped_step_is_not_counted(manual: bool) -> None:
    module = Skipping(manual=manual)
    handle = adapter.attach(module, GradientConsistencyLoss(module.model), **OPTIONS)
    fit(module, DATA[:12])
    model, wrapper = wrapped()
    kept = [batch for number, batch in enumerate(DATA[:12]) if number % 3 != 2]
    assert same(module.model.state_dict(), loop(lambda b: wrapper(b).loss, model, kept))
    assert handle.step == 8


class Validating(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", self.training_step(batch, batch_idx)["loss"], batch_size=1)


def test_in_eval_mode_the_module_runs_alone() -> None:
    module = Validating("mapping")
    handle = adapter.attach(module, GradientConsistencyLoss(module.model), warmup_steps=0, pair_fn=module.pair)
    count = training.Counter(module.model)
    done = fit(module, DATA[:2], validation=DATA[2:4])
    plain = training.plain_fixmatch(module.model.eval(), DATA[3], THRESHOLD)[0]
    assert handle.step == 2
    assert "validation" in done.callback_metrics
    assert torch.equal(module.eval().training_step(DATA[3], 0)["loss"], plain)
    assert count.calls > 4


def test_steps_by_hand_need_no_trainer() -> None:
    module, handle = attached(warmup_steps=0, every=1)
    out = module.training_step(DATA[0], batch_idx=0)
    assert out.requires_grad
    assert handle.step == 1
    with torch.no_grad(), pytest.raises(GradModeError, match="no_grad"):
        module.training_step(DATA[0], batch_idx=0)


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Saving(Module):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.own = checkpoint["own"]


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(manual: bool, tmp_path: Path) -> None:
    def make(seed: int = 0) -> tuple[Saving, Any]:
        torch.manual_seed(seed)  # of the loss's generator
        module = Saving(manual=manual, dropout=0.0)
        loss = GradientConsistencyLoss(module.model, max_pairs=2)
        return module, adapter.attach(module, loss, **(OPTIONS | {"warmup_steps": 7}))

    whole, handle = make()
    fit(whole, DATA[:6], epochs=2)
    half, _ = make()
    fit(half, DATA[:6]).save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = make(seed=99)
    fit(resumed, DATA[:6], epochs=2, resume=tmp_path / "half.ckpt")
    assert same(resumed.state_dict(), whole.state_dict())
    assert not same(half.state_dict(), whole.state_dict())
    assert again.step == handle.step == 12
    assert resumed.own == 7


@pytest.mark.parametrize("state", [None, 3, {"step": 1}, {"step": -1, "consistency": [{}]}, {"consistency": []}])
def test_a_checkpoint_without_the_state_is_refused(state: Any) -> None:
    module, _ = attached()
    with pytest.raises(StateError, match=r"checkpoint holds|state_dict.* holds|`state` holds"):
        module.on_load_checkpoint({} if state is None else {adapter.CHECKPOINT_KEY: state})


def test_a_checkpoint_without_the_state_may_start_the_term_anew() -> None:
    module, handle = attached()
    module.strict_loading = False
    module.on_load_checkpoint({})
    assert handle.step == 0


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_without_the_state_is_refused_for_training_alone(stage: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = fit(Module("tensor", dropout=0.0), DATA[:2])
    trainer.save_checkpoint(tmp_path / "bare.ckpt")
    module, handle = attached(dropout=0.0)
    run = {name: getattr(trainer, name) for name in ("fit", "validate", "test", "predict")}[stage]
    if stage == "fit":
        with pytest.raises(StateError, match="checkpoint holds NoneType"):
            run(module, loader(DATA[:2]), ckpt_path=tmp_path / "bare.ckpt")
    else:
        setattr(module, f"{stage}_step".replace("validate", "validation"), lambda batch, batch_idx: torch.zeros(()))
        run(module, loader(DATA[:2]), ckpt_path=tmp_path / "bare.ckpt")
        assert torch.equal(module.model[0].weight, torch.load(tmp_path / "bare.ckpt")["state_dict"]["model.0.weight"])
    assert handle.step == 0


# -- several processes -------------------------------------------------------------------------------------------------


def test_two_processes() -> None:
    """Lightning's DDP on gloo in a process of its own, which forks before anything ran: see the program."""
    program = Path(__file__).parents[1] / "support" / "lightning_ddp.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["automatic", "manual", "resumed"]
