"""N7, N8 and N10 of the test plan: casts that autocast keeps, and precision flags of torch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gradconsist import GradientConsistencyLoss
from support import compare, state
from support.zoo import CASES

ENGINES = pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])


def _swap(model: torch.nn.Module, weights: list[Tensor]) -> list[Tensor]:
    """Other weights in place, as an average of them is swapped in for an evaluation; returns the old ones."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return before


@ENGINES
def test_n08_weights_swapped_inside_an_autocast_region(engine: str) -> None:
    """A forward before the swap leaves casts of the old weights in autocast's cache: the comparison sees none of them.

    Bitwise the value and gradient of a fresh region; and back again after the weights were swapped back.
    """
    p = CASES["mlp"].problem(dtype=torch.float32)
    average = [parameter.detach() + 0.3 for parameter in p.model.parameters()]
    twin = copy.deepcopy(p.model)
    _swap(twin, average)
    expected = []
    for model in (twin, p.model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = GradientConsistencyLoss(model, engine=engine)(*p.views)
        expected.append((loss.detach(), compare.gradient_of(loss, model)))
    assert not torch.equal(expected[0][0], expected[1][0])

    gc = GradientConsistencyLoss(p.model, engine=engine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p.model(p.weak).sum()  # fills the cache, with a graph
        own = _swap(p.model, average)
        swapped = gc(*p.views)
        first = compare.gradient_of(swapped, p.model)
        _swap(p.model, own)
        back = gc(*p.views)
    assert torch.equal(swapped, expected[0][0])
    assert torch.equal(first, expected[0][1])
    assert torch.equal(back, expected[1][0])
    assert torch.equal(compare.gradient_of(back, p.model), expected[1][1])


@ENGINES
def test_n07_teacher_and_student_in_one_region(engine: str) -> None:
    """The term beside a teacher under no_grad and a student, in both orders: every parameter gets a gradient."""
    p = CASES["cnn_batchnorm_train"].problem(dtype=torch.float32)
    gc = GradientConsistencyLoss(p.model, engine=engine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = gc(*p.views)
        with torch.no_grad():
            target = p.model(p.weak).argmax(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            gc.measure(*p.views)
        student = torch.nn.functional.cross_entropy(p.model(p.strong), target)
    (student + 0.0 * term).backward()
    for name, parameter in p.model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class _PlantedError(Exception):
    pass


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize("allowed", [True, False], ids=["TF32", "no TF32"])
@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_train", "lstm", "attention_functional"])
def test_n10_precision_flags_are_the_users(name: str, allowed: bool, engine: str) -> None:
    """Flags only, for there is no GPU here: on or off, inside the model they are as set, and so they are afterwards.

    The recurrent kernels of mkldnn and cuDNN are switched off inside, since they have no second derivative.
    """
    p = CASES[name].problem(dtype=torch.float32)
    inside: list[dict[str, Any]] = []
    p.model.register_forward_pre_hook(lambda module, args: inside.append(state.precision()))
    with _tf32(allowed):
        process = state.of_process()
        gc = GradientConsistencyLoss(p.model, engine=engine)
        gc(*p.views).backward()
        gc.measure(*p.views)
        handle = p.model.register_forward_hook(_raise)
        with pytest.raises(_PlantedError, match="planted"):
            gc(*p.views)
        handle.remove()
        assert state.differences(process, state.of_process()) == []
    assert inside
    assert all(seen == process["precision"] for seen in inside)


def _raise(*_: object) -> None:
    raise _PlantedError("planted")
