"""Checks how a method is called and with what batch, and explains steps that fail inside torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist._inputs.batch import check_alike, check_inputs, leaves, places
from gradconsist._inputs.pairs import check_one_device
from gradconsist._refusals.failures import innermost, model_failure
from gradconsist.errors import (
    ConfigError,
    DeviceError,
    GradConsistError,
    InputShapeError,
    InputTypeError,
    InputValueError,
)
from gradconsist.types import SSLBatch

_PARTS = ("x", "y", "weak", "strong")


def check_call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SSLBatch:
    """Checks that a method of class `name` is called with one argument, a batch that fits, and returns that."""
    if (len(args) == 1 and not kwargs) or (not args and set(kwargs) == {"batch"}):
        return _checked(args[0] if args else kwargs["batch"])
    given = [f"{len(args)} positional argument{'s' if len(args) > 1 else ''}"] if args else []
    given += [f"the keyword{'s' if len(kwargs) > 1 else ''} {', '.join(map(repr, kwargs))}"] if kwargs else []
    raise InputTypeError(
        f"{name} was called with {' and '.join(given) or 'nothing'}, but takes one batch: pass"
        " SSLBatch(x, y, weak, strong)."
    )


def _checked(batch: object) -> SSLBatch:
    """Checks that a batch is an `SSLBatch` with labeled and unlabeled inputs, whose parts match row by row."""
    if not isinstance(batch, SSLBatch):
        raise InputTypeError(f"`batch` is of type {type(batch).__name__}: pass SSLBatch(x, y, weak, strong).")
    _check_labels(batch.y)
    labeled, *views = (check_inputs(f"batch.{name}", getattr(batch, name)) for name in ("x", "weak", "strong"))
    x, weak, strong = (len(leaves(part)[0]) for part in (labeled, *views))
    if x != len(batch.y) or weak != strong:
        raise InputShapeError(
            f"`batch` has {x} labeled inputs x, {len(batch.y)} labels y, {weak} weak and {strong} strong views: x and"
            " y, weak and strong belong together row by row. (A sequence is one tensor for each argument of the model,"
            " not a list of samples.)"
        )
    for name, view in zip(("batch.weak", "batch.strong"), views, strict=True):
        check_alike("batch.x", labeled, name, view)
    return batch


def _check_labels(y: Any) -> None:
    """Checks that labels are whole numbers [n]; torch's cross-entropy checks rows of probabilities."""
    if not isinstance(y, Tensor):
        remedy = " (for NumPy arrays: torch.from_numpy)" if hasattr(y, "__array__") else ""
        raise InputTypeError(f"`batch.y` is of type {type(y).__name__}: pass class indices [n]{remedy}.")
    if y.is_floating_point() and y.dim() == 2 and y.shape[1] > 1:
        return
    if y.dtype not in (torch.int64, torch.uint8):
        whole = not y.is_floating_point() and not y.is_complex() and y.dtype != torch.bool
        remedy = "" if whole else " if it holds class indices; a method trains a classifier"
        raise InputTypeError(f"`batch.y` is {y.dtype}, expected class indices of torch.int64: pass `y.long()`{remedy}.")
    if y.dim() != 1:
        raise InputShapeError(
            f"`batch.y` has shape {tuple(y.shape)}, expected class indices [n]: pass `y.flatten()` for [n, 1], or"
            " `y.argmax(1)` for rows with a single 1."
        )


def check_index(batch: SSLBatch, samples: int) -> Tensor:
    """Checks the `index` of a checked batch and returns it: positions [m] in range(samples), int64."""
    index = batch.index
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        found = str(index.dtype) if isinstance(index, Tensor) else type(index).__name__
        raise InputTypeError(
            f"`batch.index` is {found}: this method remembers each unlabeled sample; pass its position in the data"
            " set as integers, SSLBatch(x, y, weak, strong, index)."
        )
    weak = leaves(batch.weak)[0]
    if index.shape != weak.shape[:1]:
        raise InputShapeError(
            f"`batch.index` has shape {tuple(index.shape)}, expected ({len(weak)},): one entry for each view."
        )
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= samples):
        raise InputValueError(
            f"`batch.index` goes from {int(index.min())} to {int(index.max())}, outside range({samples}): give"
            " `samples` the size of the unlabeled data set."
        )
    return index.long().to(weak.device)


def check_classes(logits: Tensor, classes: int) -> None:
    """Checks that logits [B, C] have as many classes as the method's state."""
    if logits.shape[1] != classes:
        raise ConfigError(f"`classes` is {classes}, but the model gives {logits.shape[1]} logits: make them equal.")


def step_failure(method: nn.Module, error: Exception, batch: SSLBatch) -> GradConsistError | None:
    """Turns an error that torch raised in a method's step into one of this library's; None if it is to pass."""
    if isinstance(error, GradConsistError):
        return None
    said = str(error)
    parts = {f"batch.{name}": getattr(batch, name) for name in _PARTS}
    if isinstance(error, RuntimeError) and "device" in said:
        members = [member for name, part in parts.items() for member in places(name, part)]
        try:
            check_one_device(method, {place: leaf for place, leaf in members if isinstance(leaf, Tensor)})
        except DeviceError as found:
            return found
    place = innermost(method, error)
    if place is not None and place[0] != "":
        del parts["batch.y"]
        return model_failure(error, method, parts, root="")
    if "out of bounds" in said or "Class values must be" in said:
        return InputValueError(
            f"`batch.y` has classes from {int(batch.y.min())} to {int(batch.y.max())}, but the model has fewer logits"
            f" ({said.rstrip('.')}): give class indices from 0 to the number of logits - 1."
        )
    if "one_hot is only applicable" in said:
        return InputTypeError(f"`batch.y` is {batch.y.dtype}, but this method needs class indices [n] of torch.int64.")
    return None
