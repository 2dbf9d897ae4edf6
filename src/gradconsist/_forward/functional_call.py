"""A module run with other tensors in the place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    left: dict[str, Tensor] | None = None,
) -> Any:
    """``functional_call`` that replaces and puts back each place once.

    Torch's own finds tied tensors by their names. A module that is registered under two names has two names for one
    place: torch replaces it twice, and what it puts back last is the replacement, so that the user's model would be
    left without its parameter, in silence (seen in torch 2.13 and 2.15).

    Args:
        module: what to call.
        tensors: replacements by name; tied tensors by the first of their names.
        args: for the call.
        kwargs: for the call.
        left: filled with what is in the places of `tensors` after the call: a module may put others there.

    Returns:
        What the module returns.
    """
    places = list(_places(module))
    given = {id(own): tensors[name] for name, own in places if name in tensors}
    tied = {name: given[id(own)] for name, own in places if id(own) in given}
    replaced = {**tensors, **tied}
    result = functional_call(module, replaced, args, dict(kwargs or {}), tie_weights=False)
    if left is not None:
        left |= {name: replaced[name] for name in tensors}
    return result


def _places(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every place of a parameter or buffer, once, by its first name."""
    for path, owner in module.named_modules():
        for key, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                yield f"{path}.{key}" if path else key, tensor
