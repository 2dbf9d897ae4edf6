"""Finds the module that mixes the samples of a batch, by running one sample alone and together with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist.errors import UnsupportedModuleError


@dataclass(eq=False)
class _Call:
    """One call of a module, with copies of its input and output tensors."""

    path: str
    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)


def mixing_refusal(
    model: nn.Module, alone: Callable[[], Any], together: Callable[[], Any], tolerance: float, row: int, count: int
) -> UnsupportedModuleError:
    """Builds the error for a model or loss that mixes samples, naming the place where it does.

    The place is the first call, in order of completion, whose inputs for the sample agree between the two runs and
    whose outputs do not. `alone` runs model and loss on one sample, `together` on `count`, of which that one is in
    place `row`; rounding may cause differences up to `tolerance`, relative to the largest entry.
    """
    modules = dict(model.named_modules())
    with _recorded(model) as first:
        alone()
    with _recorded(model) as second:
        together()
    place = _place(first, second, partial(_agree, tolerance=tolerance, row=row, count=count))
    if place is None:
        where, remedy = "`loss_fn` or code around the model's layers", "compute each sample's output and loss alone"
    elif place == "":
        inside = ", outside its layers" if len(modules) > 1 else ""
        where = f"the forward of `model` ({type(model).__name__}){inside}"
        remedy = "rewrite it so that each sample is computed alone"
    elif place == "loss_fn":
        where = "`loss_fn` (the model's output does not change)"
        remedy = "return one loss per sample, each computed from that sample's row alone"
    else:
        module = modules[place]
        own = ", in its own forward" if any(True for _ in module.children()) else ""
        where = f"`model.{place}` ({type(module).__name__}){own}"
        remedy = "put that layer in eval mode if it mixes in train mode only, or replace it"
        if getattr(module, "batch_first", True) is False:
            remedy = "its batch_first=False makes dimension 1 the batch: pass batch_first=True, or transpose its input"
    return UnsupportedModuleError(
        "a sample's output or loss changes with the other samples of the batch, beyond BatchNorm. It comes from"
        f" {where}, which normalises, mixes, sorts or routes over the batch. A per-sample gradient is not defined"
        f" there: {remedy}."
    )


def _place(
    first: Sequence[_Call], second: Sequence[_Call], agree: Callable[[list[Tensor], list[Tensor]], bool]
) -> str | None:
    """Returns the path of the module that mixes, "loss_fn", or None if it is not clear."""
    if [call.path for call in first] != [call.path for call in second]:
        return None  # which modules run depends on the number of samples
    for one, two in zip(first, second, strict=True):
        if agree(one.inputs, two.inputs) and not agree(one.outputs, two.outputs):
            return one.path
    outermost = [pair for pair in zip(first, second, strict=True) if pair[0].path == ""]
    known = outermost and all(one.outputs and agree(one.outputs, two.outputs) for one, two in outermost)
    return "loss_fn" if known else None


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[_Call]]:
    """Records the calls of all modules of `model` inside the block, in order of completion."""
    finished: list[_Call] = []
    running: list[_Call] = []
    paths = {module: path for path, module in model.named_modules()}

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(_Call(paths[module], _tensors((args, kwargs))))

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = running.pop()
        call.outputs = _tensors(output)
        finished.append(call)

    hooks = []
    try:
        for module in paths:
            hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            hooks.append(module.register_forward_hook(end, with_kwargs=True))
        yield finished
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> list[Tensor]:
    """Copies the tensors of a nested structure, since a layer that works in place would overwrite them."""
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif not isinstance(value, list | tuple):
        value = list(vars(value).values()) if hasattr(value, "__dict__") and not callable(value) else []
    return [tensor for part in value for tensor in _tensors(part)]


def _agree(first: Sequence[Tensor], second: Sequence[Tensor], *, tolerance: float, row: int, count: int) -> bool:
    """Tells whether the sample has the same numbers in both runs."""
    if len(first) != len(second):
        return False
    return all(
        any(_close(a, part, tolerance) for part in _parts(a, b, row, count)) for a, b in zip(first, second, strict=True)
    )


def _parts(alone: Tensor, together: Tensor, row: int, count: int) -> Iterator[Tensor]:
    """Yields what may be the sample in `together`: all, a block of a dimension, or every count-th row of it."""
    if alone.shape == together.shape:
        yield together
    for dim in range(alone.dim() if alone.dim() == together.dim() else 0):
        size = alone.shape[dim]
        if together.shape == (*alone.shape[:dim], count * size, *alone.shape[dim + 1 :]):
            yield together.narrow(dim, row * size, size)
            yield together.unflatten(dim, (size, count)).select(dim + 1, row)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = torch.isfinite(a) & torch.isfinite(b)
    a, b = a[finite], b[finite]
    return a.numel() == 0 or bool(((a - b).abs() <= tolerance * b.abs().amax().clamp(min=1e-3)).all())
