"""Inputs with a leading batch dimension: one tensor, or a dict, tuple or list of tensors.

Whatever the user passes is normalised once, by `check_inputs`, to a tensor, a dict or a tuple; the rest of the library
meets nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradconsist.errors import InputShapeError, InputTypeError
from gradconsist.types import Inputs


def leaves(inputs: Inputs) -> list[Tensor]:
    """The tensors of `inputs`, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)


def map_leaves(function: Callable[..., Any], *inputs: Any) -> Any:
    """Applies `function` to corresponding tensors of equally built `inputs`; returns the same structure."""
    first = inputs[0]
    if isinstance(first, Tensor):
        return function(*inputs)
    if isinstance(first, Mapping):
        return {key: function(*(other[key] for other in inputs)) for key in first}
    return tuple(function(*row) for row in zip(*inputs, strict=True))


def rebuilt(template: Inputs, values: Sequence[Tensor]) -> Inputs:
    """Inputs of the structure of `template` with other tensors."""
    supply = iter(values)
    result: Inputs = map_leaves(lambda _: next(supply), template)
    return result


def take(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """The rows `index` of every tensor."""
    taken: Inputs = map_leaves(lambda leaf: leaf[index], inputs)
    return taken


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """``model(x)``, ``model(**x)`` or ``model(*x)``, after the kind of `inputs`."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def concatenable(first: Inputs, second: Inputs) -> bool:
    """Whether the tensors of both agree in all dimensions but the batch."""
    second = map_leaves(lambda _, leaf: leaf, first, second)  # in the order of the first
    return all(a.shape[1:] == b.shape[1:] for a, b in zip(leaves(first), leaves(second), strict=True))


def concatenate(*batches: Inputs) -> Inputs:
    """All batches as one."""
    joined: Inputs = map_leaves(lambda *parts: torch.cat(parts), *batches)
    return joined


def places(name: str, inputs: Any) -> list[tuple[str, Any]]:
    """The members of `inputs`, each with the expression that names it in a message, such as ``weak['mask']``."""
    if isinstance(inputs, Mapping):
        return [(f"{name}[{key!r}]", leaf) for key, leaf in inputs.items()]
    if isinstance(inputs, tuple):
        return [(f"{name}[{position}]", leaf) for position, leaf in enumerate(inputs)]
    return [(name, inputs)]


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a subclass of Tensor decides what operations do with it: distributed, masked, fake or packed numbers."""
    own: Any = type(tensor.data).__torch_dispatch__
    return own is not Tensor.__torch_dispatch__


def check_inputs(name: str, inputs: Any) -> Inputs:
    """Normalises a view and says what is wrong with it.

    Args:
        name: the argument's name, for the message.
        inputs: what the user passed.

    Returns:
        A tensor, a dict or a tuple, with one common batch size.

    Raises:
        InputTypeError: not a tensor, or a dict, tuple or list of tensors; or a tensor of a kind that is not handled.
        InputShapeError: no batch dimension, an empty batch, or different batch sizes inside.
    """
    if isinstance(inputs, Mapping):
        normal: Any = dict(inputs)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
        normal = tuple(inputs)
    else:
        normal = inputs
    members = dict(places(name, normal))
    if not members:
        raise InputShapeError(f"`{name}` is empty: pass a tensor, or a dict, tuple or list of tensors, batch first.")
    for place, leaf in members.items():
        _check_leaf(place, leaf)
    sizes = {place: leaf.shape[0] for place, leaf in members.items()}
    if len(set(sizes.values())) > 1:
        raise InputShapeError(f"`{name}` mixes batch sizes ({sizes}): every tensor needs the same first dimension.")
    return normal


def _check_leaf(place: str, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise InputTypeError(
            f"`{place}` is a {type(leaf).__name__}, not a tensor: pass a tensor, or a flat dict, tuple or list of"
            " tensors, batch first (for NumPy arrays: torch.from_numpy)."
        )
    if leaf.is_nested or leaf.layout is not torch.strided or leaf.is_quantized or leaf.is_complex():
        kind = "nested" if leaf.is_nested else "quantized" if leaf.is_quantized else str(leaf.layout)
        kind = "complex" if leaf.is_complex() else kind
        raise InputTypeError(f"`{place}` is a {kind} tensor: pass an ordinary dense, real tensor.")
    if is_wrapper(leaf):
        raise InputTypeError(f"`{place}` is a {type(leaf).__name__}: pass an ordinary dense tensor.")
    if leaf.dim() == 0:
        raise InputShapeError(f"`{place}` has no dimensions: the first one must be the batch.")
    if leaf.shape[0] == 0:
        raise InputShapeError(f"`{place}` has an empty batch (shape {tuple(leaf.shape)}): skip the step instead.")


def same_structure(first: Inputs, second: Inputs) -> bool:
    """Whether both are built alike: two tensors, dicts with the same keys, or tuples of one length."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return set(first) == set(second)
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor)
    return isinstance(first, Sequence) and isinstance(second, Sequence) and len(first) == len(second)
