"""Every model of the zoo on CUDA, under one engine and with one group of options, in turn."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from gradconsist import GradientConsistencyLoss, RandomProjection
from gradconsist.errors import GradConsistError
from support import compare, models
from support.zoo import CASES, Problem

from .devices import computing_on, move

ENGINES = ("loop", "vmap", "ghost")
PAIRS = 2
WEIGHT = torch.tensor([0.0, 0.5], dtype=torch.float64)
#: Options of the loss; "weight" is passed to the call.
GROUPS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weighted chunks": {"weight": WEIGHT, "chunk_size": 1},
    "an ordinary graph": {"fused": False, "chunk_size": 1, "reduction": "none"},
    "a subset": {"max_pairs": 1, "stop_gradient": "strong", "reduction": "sum"},
    "projected": {"projection": RandomProjection(2, seed=3)},
    "running statistics": {"batchnorm": "running", "stop_gradient": "weak"},
    "through the statistics": {"through_statistics": True},
}
#: 60 models against 21 pairs of an engine and a group: tests/core crosses the models with the engines on the CPU.
ROWS = list(zip(CASES, itertools.cycle(itertools.product(ENGINES, GROUPS)), strict=False))


def problem(name: str, device: str) -> Problem:
    """The row on the device, including what a model keeps without saying so."""
    found = CASES[name].problem(pairs=PAIRS)
    found.model.to(device)
    for module in found.model.modules():
        if isinstance(module, models.Unregistered):
            module.seen = module.seen.to(device)
    found.weak, found.strong, found.target = (move(part, device) for part in found.views)
    return found


def outcome(name: str, engine: str, options: dict[str, Any], device: str) -> dict[str, Tensor] | GradConsistError:
    """Loss, gradient and record of one call, on the CPU; or its refusal."""
    here, options = problem(name, device), dict(options)
    weight = move(options.pop("weight", None), device)
    gc = GradientConsistencyLoss(
        here.model, encoder=here.case.encoder, loss_fn=here.case.loss_fn, engine=engine, **options
    )
    try:
        loss = gc(*here.views, weight)
    except GradConsistError as error:
        return error
    gradient = compare.gradient_of(loss, here.model, torch.ones_like(loss))
    assert {loss.device.type, gc.last.cosine.device.type, gradient.device.type} == {device}
    found = {"loss": loss.detach(), "gradient": gradient, "cosine": gc.last.cosine, "norm_weak": gc.last.norm_weak}
    return {key: value.cpu() for key, value in found.items()}


@pytest.mark.parametrize(("name", "how"), ROWS, ids=lambda part: part if isinstance(part, str) else "-".join(part))
def test_a_model_equals_itself_on_the_cpu(name: str, how: tuple[str, str]) -> None:
    engine, group = how
    if name in ("gru", "lstm") and engine == "vmap":
        pytest.skip("vmap meets other kernels than on the CPU there, cuDNN's or fused cells, and refuses or runs them")
    options = GROUPS[group]
    with computing_on("cpu"):
        expected = outcome(name, engine, options, "cpu")
    found = outcome(name, engine, options, "cuda")
    if isinstance(expected, GradConsistError):
        assert type(found) is type(expected), found
        return
    assert not isinstance(found, GradConsistError), found
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


def test_every_engine_meets_every_group() -> None:
    assert {how for _, how in ROWS} == set(itertools.product(ENGINES, GROUPS))
