"""Inputs with a leading batch dimension: one tensor, or a dict, tuple or list of tensors and constants.

Constants are what a model takes besides tensors: None, flags, numbers, strings, dtypes and devices. Tensors have one
row per sample; constants go to the model unchanged. `check_inputs` normalises the user's inputs once to a tensor, a
dict or a tuple, and the rest of the library sees nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from gradconsist.errors import InputShapeError, InputTypeError, InputValueError
from gradconsist.types import Constant, Inputs

_CONSTANTS = get_args(Constant)


def is_constant(member: object) -> bool:
    """Tells whether a member of a mapping or sequence goes to the model unchanged."""
    return isinstance(member, _CONSTANTS)


def same_constant(a: object, b: object) -> bool:
    """Tells whether two constants are the same to the model: equal and of one type, so True is not 1."""
    return a is b or (is_constant(a) and type(a) is type(b) and a == b)


def members(inputs: Inputs) -> list[Any]:
    """Returns the tensors and constants of `inputs`, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)


def leaves(inputs: Inputs) -> list[Tensor]:
    """Returns the tensors of `inputs`, in order."""
    return [member for member in members(inputs) if isinstance(member, Tensor)]


def constants(inputs: Inputs) -> Hashable:
    """Returns the constants of `inputs` with their places, as a key: with others the model may compute differently."""
    return tuple((place, repr(member)) for place, member in places("", inputs) if is_constant(member))


def shapes(inputs: Inputs) -> Hashable:
    """Returns shapes and dtypes of one sample's tensors, as a key: with others the model may compute differently."""
    return tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves(inputs))


def map_leaves(function: Callable[..., Any], *inputs: Any) -> Any:
    """Applies `function` to corresponding tensors of `inputs` of one structure; keeps the constants of the first."""
    return map_members(lambda *row: function(*row) if isinstance(row[0], Tensor) else row[0], *inputs)


def map_members(function: Callable[..., Any], *inputs: Any) -> Any:
    """Applies `function` to corresponding members of `inputs` of one structure; returns the structure of the first."""
    first = inputs[0]
    if isinstance(first, Tensor):
        return function(*inputs)
    if isinstance(first, Mapping):
        return {key: function(*(other[key] for other in inputs)) for key in first}
    return tuple(function(*row) for row in zip(*inputs, strict=True))


def rebuilt(template: Inputs, values: Sequence[Tensor]) -> Inputs:
    """Returns `template` with its tensors replaced by `values`, in order."""
    supply = iter(values)
    result: Inputs = map_leaves(lambda _: next(supply), template)
    return result


def in_order_of(first: Inputs, second: Inputs) -> Inputs:
    """Returns `second` with its entries in the order of `first`; entries of mappings are matched by key."""
    ordered: Inputs = map_members(lambda _, member: member, first, second)
    return ordered


def doubled(member: Any) -> Any:
    """Converts a member for a model in float64: floating tensors (detached) and floating dtypes become float64."""
    if isinstance(member, torch.dtype):
        return torch.float64 if member.is_floating_point else member
    return member.detach().double() if isinstance(member, Tensor) and member.is_floating_point() else member


def take(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """Takes the samples `index` of every tensor."""
    taken: Inputs = map_leaves(lambda leaf: leaf[index], inputs)
    return taken


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Calls ``model(x)``, ``model(**x)`` or ``model(*x)``, depending on the type of `inputs`."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def concatenable(first: Inputs, second: Inputs) -> bool:
    """Tells whether the tensors of both agree in all dimensions but the batch."""
    both = zip(leaves(first), leaves(in_order_of(first, second)), strict=True)
    return all(a.shape[1:] == b.shape[1:] for a, b in both)


def concatenate(*batches: Inputs) -> Inputs:
    """Concatenates batches along the batch dimension."""
    joined: Inputs = map_leaves(lambda *parts: torch.cat(parts), *batches)
    return joined


def places(name: str, inputs: Any) -> list[tuple[str, Any]]:
    """Lists the members of `inputs`, each with its name for a message, such as ``weak['mask']``."""
    if isinstance(inputs, Mapping):
        return [(f"{name}[{key!r}]", leaf) for key, leaf in inputs.items()]
    if isinstance(inputs, tuple | list):
        return [(f"{name}[{position}]", leaf) for position, leaf in enumerate(inputs)]
    return [(name, inputs)]


def is_wrapper(tensor: Tensor) -> bool:
    """Tells whether `tensor` is of a subclass with its own dispatch (distributed, masked, fake or packed numbers)."""
    own: Any = type(tensor.data).__torch_dispatch__
    return own is not Tensor.__torch_dispatch__


def check_inputs(name: str, inputs: Any) -> Inputs:
    """Checks the user's argument `name` and returns its normal form: a tensor, dict or tuple, of one batch size."""
    if isinstance(inputs, Mapping):
        normal: Any = dict(inputs)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
        normal = tuple(inputs)
    else:
        normal = inputs
    given = dict(places(name, normal))
    if not given:
        raise InputShapeError(f"`{name}` is empty: pass a tensor, or a dict, tuple or list of tensors, batch first.")
    tensors = {place: member for place, member in given.items() if place == name or not is_constant(member)}
    for place, leaf in tensors.items():
        _check_leaf(place, leaf)
    if not tensors:
        raise InputTypeError(f"`{name}` holds no tensor: {_remedy(normal)}")
    sizes = {place: leaf.shape[0] for place, leaf in tensors.items()}
    if len(set(sizes.values())) > 1:
        raise InputShapeError(f"`{name}` mixes batch sizes ({sizes}): every tensor needs the same first dimension.")
    return normal


def _remedy(found: Any) -> str:
    """Says what to pass instead of `found`."""
    if isinstance(found, str) or (isinstance(found, Sequence) and any(isinstance(each, str) for each in found)):
        return "tokenize texts first, and pass the tokenizer's tensors (return_tensors='pt')."
    return (
        "pass a tensor, or a flat dict, tuple or list of tensors, batch first, and constants such as None, flags and"
        " strings (for NumPy arrays: torch.from_numpy; for lists of numbers: torch.tensor)."
    )


def _check_leaf(place: str, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise InputTypeError(f"`{place}` is of type {type(leaf).__name__}, not a tensor: {_remedy(leaf)}")
    if leaf.is_nested or leaf.layout is not torch.strided or leaf.is_quantized or leaf.is_complex():
        kind = "nested" if leaf.is_nested else "quantized" if leaf.is_quantized else str(leaf.layout)
        kind = "complex" if leaf.is_complex() else kind
        raise InputTypeError(f"`{place}` is a {kind} tensor: pass an ordinary dense, real tensor.")
    if is_wrapper(leaf):
        raise InputTypeError(f"`{place}` is of type {type(leaf).__name__}: pass an ordinary dense tensor.")
    if leaf.dim() == 0:
        raise InputShapeError(
            f"`{place}` has no dimensions: the first one must be the batch. Pass a constant as a Python number."
        )
    if leaf.shape[0] == 0:
        raise InputShapeError(f"`{place}` has an empty batch (shape {tuple(leaf.shape)}): skip the step instead.")


def _same_structure(first: Inputs, second: Inputs) -> bool:
    """Tells whether both have one structure: two tensors, dicts with the same keys, or tuples of one length."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return set(first) == set(second)
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor)
    return isinstance(first, Sequence) and isinstance(second, Sequence) and len(first) == len(second)


def check_alike(name: str, first: Inputs, other: str, second: Inputs) -> None:
    """Checks that two views have one structure, with tensors at the same places and equal constants at the others."""
    if not _same_structure(first, second):
        raise InputTypeError(
            f"`{name}` and `{other}` are built differently: both need the same keys or number of tensors."
        )
    pairs = zip(places(name, first), places(other, in_order_of(first, second)), strict=True)
    for (place, a), (its_place, b) in pairs:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            continue
        found = " and ".join(f"`{where}` is {_shown(member)}" for where, member in ((place, a), (its_place, b)))
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            raise InputTypeError(f"{found}: pass a tensor in both, or the same constant in both.")
        if not same_constant(a, b):
            raise InputValueError(f"{found}: the model gets one value for all samples, so pass the same in both.")


def _shown(member: Any) -> str:
    return "a tensor" if isinstance(member, Tensor) else f"{member!r:.80}"
