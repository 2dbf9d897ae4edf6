from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.runs import MakeConfig, differing, final, stepped, take
from trainer.config import Config
from trainer.errors import NonFiniteLossError
from trainer.step import Trainer
from trainer.training import run


def trained(config: Config, steps: int) -> Trainer:
    return stepped(config, steps)[0]


def flat(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in trainer.model.parameters()])


def moved(trainer: Trainer) -> torch.Tensor:
    """How far training went, as one vector."""
    return flat(trainer) - flat(trained(trainer.config, 0))


def apart(a: Trainer, b: Trainer) -> float:
    """Difference of two trainings, relative to what the first changed."""
    return float((flat(a) - flat(b)).norm() / moved(a).norm())


# All pairs count, whatever their confidence: a mask that flips by rounding would hide what is compared here.
EVERY_STEP: dict[str, Any] = {
    "ggcr_warmup": 0, "ggcr_every": 1, "ggcr_weight": 5.0, "ggcr_gate": "all", "threshold": 0.0, "unlabeled_ramp": 0,
}  # fmt: skip


@pytest.mark.parametrize(("amp", "tolerance"), [("bf16", 0.3), ("fp16", 0.1)])
def test_half_precision_trains_as_float32_does_with_the_term(tiny: MakeConfig, amp: str, tolerance: float) -> None:
    """One step (later, rounding flips pseudo-labels): near float32's, and far from a step without the term."""
    reference = trained(tiny(**EVERY_STEP), 1)
    half = trained(tiny(**EVERY_STEP, amp=amp), 1)
    without = trained(tiny(**{**EVERY_STEP, "ggcr_weight": 0.0}, amp=amp), 1)
    assert 0 < apart(reference, half) < tolerance
    assert apart(reference, without) > 2 * tolerance
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_resumes_bitwise(tiny: MakeConfig, amp: str) -> None:
    whole, cut = (tiny(name, amp=amp, steps=4, eval_every=4, ggcr_warmup=1) for name in ("whole", "cut"))
    assert run(whole) == 0
    assert run(dataclasses.replace(cut, stop_after_steps=2)) == 0
    assert run(cut) == 0
    assert differing(str(whole.output), str(cut.output)) == []
    scaled = amp == "fp16"
    line = (Path(str(whole.output)) / "metrics.jsonl").read_text().splitlines()[0]
    assert ("loss_scale" in json.loads(line)) == (".scaler.scale" in final(str(whole.output))) == scaled


def test_the_loss_scale_halves_at_an_overflow_and_is_in_the_checkpoint(tiny: MakeConfig) -> None:
    trainer, dataset = stepped(tiny(amp="fp16"), 1)
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})  # overflows in float16
    before, steps = flat(trainer), trainer.step
    trainer.meter.flush()
    take(trainer, dataset, [1])
    assert torch.equal(flat(trainer), before)  # skipped
    assert trainer.step == steps + 1
    numbers = trainer.meter.flush()
    assert (numbers["loss_scale"], numbers["skipped"]) == (2.0**40, 1.0)
    assert trainer.state_dict()["scaler"]["scale"] == 2.0**39
    restored = trained(tiny(amp="fp16"), 0)
    restored.load_state_dict(trainer.state_dict())
    assert restored.scaler.get_scale() == 2.0**39


def test_a_gradient_that_overflows_at_every_scale_stops_the_run(tiny: MakeConfig) -> None:
    """A scaler that halves for ever would train nothing, in silence."""
    trainer, dataset = stepped(tiny(amp="fp16", ggcr_weight=0.0), 0)
    trainer.model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    take(trainer, dataset, range(17))  # 2^16, 2^15, ..., 1
    with pytest.raises(NonFiniteLossError, match=r"step 17: the gradient is not finite at a loss scale of 0.5"):
        take(trainer, dataset, [17])


def test_channels_last_is_the_same_training(tiny: MakeConfig) -> None:
    first, second = (trained(tiny(**EVERY_STEP, channels_last=flag), 2) for flag in (False, True))
    assert second.model.encoder[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert apart(first, second) < 1e-4
