"""Sharpness-aware minimisation around a method that remembers things: the second pass is the same step again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradconsist import StepOutput
from gradconsist.optim import SAM


def same_step_twice(method: nn.Module, sam: SAM, gradient: Callable[[], StepOutput]) -> StepOutput:
    """Take SAM's two gradients of one step, and leave the second in `.grad` with the weights back in place.

    Both passes start from the same state of the method (step counters, memories, generators, BatchNorm's running
    statistics) and the same random numbers, so that the second differs by the weights alone. What the method
    remembers afterwards is from the first pass, at the weights that the step starts from.
    """
    before = _state(method)
    out = gradient()
    after = _state(method)
    sam.first_step()
    try:
        _load(method, before)
        gradient()
    finally:
        sam.restore()
        _load(method, after)
    return out


def _state(method: nn.Module) -> tuple[dict[str, Any], torch.Tensor, list[torch.Tensor]]:
    """A copy of everything but the trained weights, and the random state."""
    trained = {name for name, p in method.named_parameters(remove_duplicate=False) if p.requires_grad}
    kept = {name: value for name, value in method.state_dict().items() if name not in trained}
    return copy.deepcopy(kept), torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _load(method: nn.Module, state: tuple[dict[str, Any], torch.Tensor, list[torch.Tensor]]) -> None:
    kept, cpu, cuda = state
    method.load_state_dict(kept, strict=False)
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda)
