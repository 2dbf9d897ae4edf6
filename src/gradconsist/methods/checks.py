"""Checks of a method's arguments: the parts of an `SSLBatch`, the sample positions and the number of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradconsist._inputs.batch import check_constants, check_inputs, is_constant, leaves, members, same_structure
from gradconsist.errors import ConfigError, InputShapeError, InputTypeError, InputValueError
from gradconsist.types import Inputs, SSLBatch


def check_batch(batch: SSLBatch) -> None:
    """Checks that a batch is an `SSLBatch` whose parts match row by row.

    Args:
        batch: the argument of a method.

    Raises:
        InputTypeError: `batch` is something else, or a part is not a tensor.
        InputShapeError: parts differ in length where they must match, or there is no labeled or no unlabeled input.
        InputValueError: parts hold different constants.
    """
    if not isinstance(batch, SSLBatch):
        raise InputTypeError(f"`batch` is a {type(batch).__name__}: pass SSLBatch(x, y, weak, strong).")
    for name, part in zip(("x", "y", "weak", "strong"), batch[:4], strict=True):
        if not isinstance(part, Tensor if name == "y" else Tensor | Mapping | Sequence):
            remedy = "pass class indices [n]" if name == "y" else "pass a tensor, or a mapping or sequence with tensors"
            remedy += " (for NumPy arrays: torch.from_numpy)" if hasattr(part, "__array__") else ""
            raise InputTypeError(
                f"`batch.{name}` is a {type(part).__name__}: {remedy}; a method that trains on one view needs `strong`"
                " for the pair that gradient consistency compares."
            )
    _check_labels(batch.y)
    x, y, weak, strong = (_rows(f"batch.{name}", getattr(batch, name)) for name in ("x", "y", "weak", "strong"))
    if x != y or weak != strong:
        raise InputShapeError(
            f"`batch` has {x} labeled inputs x, {y} labels y, {weak} weak and {strong} strong views: x and y, weak and"
            " strong belong together row by row. (A sequence is one tensor for each argument of the model, not a list"
            " of samples.)"
        )
    if x == 0 or weak == 0:
        raise InputShapeError(
            f"`batch` has {x} labeled and {weak} unlabeled inputs, but a mean over none is NaN: give at least one of"
            " each; drop the loader's last batch if it is empty."
        )
    x_built, *views = (check_inputs(f"batch.{name}", getattr(batch, name)) for name in ("x", "weak", "strong"))
    for name, view in zip(("weak", "strong"), views, strict=True):
        if not same_structure(x_built, view):
            raise InputTypeError(
                f"`batch.x` and `batch.{name}` are built differently: labeled inputs and views need the same keys or"
                " number of tensors."
            )
        check_constants("batch.x", x_built, f"batch.{name}", view)


def _check_labels(y: Tensor) -> None:
    """Checks that labels are whole numbers [n]; torch's cross-entropy checks rows of probabilities."""
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


def _rows(name: str, inputs: Inputs) -> int:
    parts = [member for member in members(inputs) if not is_constant(member)]
    if not parts or not all(isinstance(part, Tensor) and part.dim() for part in parts):
        check_inputs(name, inputs)  # raises the error that fits
    return len(parts[0])


def check_index(batch: SSLBatch, samples: int) -> Tensor:
    """Checks and returns the batch's `index`, which a method that remembers N samples needs.

    Args:
        batch: a checked batch.
        samples: N.

    Returns:
        Positions [m] in range(N), int64.

    Raises:
        InputTypeError: there is no index, or it does not hold integers.
        InputShapeError: the index does not have one entry per unlabeled input.
        InputValueError: an entry is outside range(N).
    """
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
    """Checks that the model returns as many classes as the method's state has.

    Args:
        logits: [B, C].
        classes: the method's number of classes.

    Raises:
        ConfigError: the numbers differ.
    """
    if logits.shape[1] != classes:
        raise ConfigError(f"`classes` is {classes}, but the model gives {logits.shape[1]} logits: make them equal.")
