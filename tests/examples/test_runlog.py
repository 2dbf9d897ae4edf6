from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer.runlog import Meter


def test_a_sample_is_summarised_by_quantiles_over_all_steps_together() -> None:
    meter = Meter()
    steps = [torch.tensor([0.0, 0.1, math.nan, 0.2]), torch.tensor([0.3, 0.4]), torch.tensor([math.nan])]
    for step in steps:
        meter.add({"cosine_sample": step, "loss": 1.0})
    # Five numbers, 0, 0.1, ..., 0.4: by linear interpolation their 10 % quantile lies 0.4 of the way to the second.
    logged = meter.flush()
    assert logged == pytest.approx({"cosine_q10": 0.04, "cosine_q50": 0.2, "cosine_q90": 0.36, "loss": 1.0})


def test_a_sample_of_nothing_has_no_quantiles() -> None:
    meter = Meter()
    meter.add({"cosine_sample": torch.tensor([math.nan, math.nan])})
    assert meter.flush() == {"cosine_q10": None, "cosine_q50": None, "cosine_q90": None}


def test_a_meter_restored_in_between_gives_the_same() -> None:
    draws = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    through, before, after = Meter(), Meter(), Meter()
    for step in draws:
        through.add({"x_sample": step, "x": step.mean()})
    for step in draws[:4]:
        before.add({"x_sample": step, "x": step.mean()})
    after.load_state_dict(before.state_dict())
    for step in draws[4:]:
        after.add({"x_sample": step, "x": step.mean()})
    logged = through.flush()
    assert after.flush() == logged
    assert logged["x_q90"] == np.quantile(draws.double().numpy(), 0.9)
