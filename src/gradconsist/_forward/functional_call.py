"""Calls a module with other tensors in place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def call_with(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    left: dict[str, Tensor] | None = None,
) -> Any:
    """Works like ``functional_call``, but replaces and restores each place once.

    ``functional_call`` finds tied tensors by name. A module that is registered under two names has two names for one
    place: torch replaces it twice and restores the replacement last. The user's model would silently lose its parameter
    (seen in torch 2.13 and 2.15).

    A tied tensor goes by its first name. `left` is filled with the tensors in the places of `tensors` after the
    call, since a module may put others there.
    """
    places = list(_places(module))
    given = {id(own): tensors[name] for name, own in places if name in tensors}
    tied = {name: given[id(own)] for name, own in places if id(own) in given}
    replaced = {**tensors, **tied}
    result = functional_call(module, replaced, args, dict(kwargs or {}), tie_weights=False)
    if left is not None:
        left |= {name: replaced[name] for name in tensors}
    return result


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors, those of one kind with one kernel."""
    found = {name: torch.empty_like(tensor) for name, tensor in tensors.items() if _is_plain(tensor)}
    kinds: dict[Any, list[str]] = {}
    for name in found:
        kinds.setdefault((tensors[name].dtype, tensors[name].device), []).append(name)
    for names in kinds.values():
        torch._foreach_copy_([found[name] for name in names], [tensors[name] for name in names])
    return {name: found[name] if name in found else tensor.clone() for name, tensor in tensors.items()}


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.requires_grad


def _places(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields each place of a parameter or buffer once, with its first name."""
    for path, owner in module.named_modules():
        for key, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                yield f"{path}.{key}" if path else key, tensor
