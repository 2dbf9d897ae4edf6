"""Choosing a form by the clock, for machines that the cost model does not fit."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

_ROUNDS = 3


def faster(run: Callable[[Tensor | None, Tensor, str], Tensor | None], x: Tensor | None, d: Tensor) -> str:
    """Runs both forms and their derivatives on copies of a layer's tensors.

    Args:
        run: (x, d, form) -> M, or None where the form gives way.
        x: the layer's input.
        d: gradients of its output.

    Returns:
        "gradient" or "gram".
    """
    times = {form: _time(run, x, d, form) for form in ("gradient", "gram")}
    return min(times, key=lambda form: times[form])


def _time(run: Callable[[Tensor | None, Tensor, str], Tensor | None], x: Tensor | None, d: Tensor, form: str) -> float:
    best = float("inf")
    for _ in range(1 + _ROUNDS):  # the first one allocates
        inputs = [_leaf(tensor) for tensor in (x, d)]
        _wait(d)
        start = time.perf_counter()
        with torch.enable_grad():
            gram = run(inputs[0], inputs[1], form)  # type: ignore[arg-type]
            if gram is None:
                return float("inf")
            wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
            torch.autograd.grad(gram.sum(), wanted)
        _wait(d)
        best = min(best, time.perf_counter() - start)
    return best


def _leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_(tensor.is_floating_point())


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
