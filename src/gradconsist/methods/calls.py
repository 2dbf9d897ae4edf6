"""Checks how a method is called, and explains calls that fail inside torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradconsist._inputs.batch import places
from gradconsist._refusals.failures import innermost, model_failure
from gradconsist.errors import DeviceError, GradConsistError, InputTypeError, InputValueError
from gradconsist.types import SSLBatch

_PARTS = ("x", "y", "weak", "strong")


def check_call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Checks that a method is called with one argument, ``batch``.

    Args:
        name: name of the method's class.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        InputTypeError: there are other arguments, for example the parts of a batch one by one.
    """
    if (len(args) == 1 and not kwargs) or (not args and set(kwargs) == {"batch"}):
        return
    given = [f"{len(args)} positional argument{'s' if len(args) > 1 else ''}"] if args else []
    given += [f"the keyword{'s' if len(kwargs) > 1 else ''} {', '.join(map(repr, kwargs))}"] if kwargs else []
    raise InputTypeError(
        f"{name} was called with {' and '.join(given) or 'nothing'}, but takes one batch: pass"
        " SSLBatch(x, y, weak, strong)."
    )


def step_failure(method: nn.Module, error: Exception, batch: Any) -> GradConsistError | None:
    """Turns an error that torch raised in a method's step into one of this library's.

    Args:
        method: the method.
        error: the error, with its traceback.
        batch: the argument of the call.

    Returns:
        The error to raise from `error`; None to let `error` pass unchanged.
    """
    if isinstance(error, GradConsistError) or not isinstance(batch, SSLBatch):
        return None
    said = str(error)
    parts = {f"batch.{name}": getattr(batch, name) for name in _PARTS}
    if isinstance(error, RuntimeError) and "device" in said:
        devices = {
            place: str(leaf.device)
            for name, part in parts.items()
            for place, leaf in places(name, tuple(part) if isinstance(part, list) else part)
            if isinstance(leaf, Tensor)
        }
        models = sorted({str(parameter.device) for parameter in method.parameters()})
        if len({*devices.values(), *models}) > 1:
            found = ", ".join(f"`{name}` on {device}" for name, device in devices.items())
            found += f", the model on {' and '.join(models)}"
            return DeviceError(f"the step needs tensors on one device, but has {found}: move them with `.to(device)`.")
    place = innermost(method, error)
    if place is not None and place[0] != "":
        del parts["batch.y"]
        return model_failure(error, method, parts, root="")
    if isinstance(batch.y, Tensor) and ("out of bounds" in said or "Class values must be" in said):
        return InputValueError(
            f"`batch.y` has classes from {int(batch.y.min())} to {int(batch.y.max())}, but the model has fewer logits"
            f" ({said.rstrip('.')}): give class indices from 0 to the number of logits - 1."
        )
    if isinstance(batch.y, Tensor) and "one_hot is only applicable" in said:
        return InputTypeError(f"`batch.y` is {batch.y.dtype}, but this method needs class indices [n] of torch.int64.")
    return None
