"""Answers conditions that depend on data while a model runs under `torch.func.vmap`.

Under vmap a tensor stands for one value per sample, so ``bool(mask.all())`` has no single answer and torch raises an
error. Here it is answered from the values of all samples, each of which counts over its own sample only. If all are
equal, that is the answer, and every sample gets the one that it would have got alone. If they differ, `SamplesDiffer`
tells the engine which samples belong together, and the engine runs each group again by itself. Later conditions split
the groups further, so the groups form a tree, and in the worst case each sample runs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.utils._pytree import tree_flatten, tree_unflatten

# Functions that read the values of their first argument.
READS = (Tensor.__bool__, Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.tolist)
_COMPARISONS = (torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, Tensor.__contains__)
# Functions whose result has a shape that depends on the data.
_SHAPED_BY_DATA = (
    torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.masked_select, Tensor.masked_select,
    torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive, torch.bincount, Tensor.bincount,
    torch.repeat_interleave, Tensor.repeat_interleave,
)  # fmt: skip
# Functions that take sizes, which may be tensors.
_SIZED = (torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye)
_SIZED_METHODS = (
    Tensor.expand, Tensor.view, Tensor.reshape, Tensor.repeat, Tensor.narrow, Tensor.split, Tensor.new_zeros,
    Tensor.new_ones, Tensor.new_full, torch.narrow, torch.split,
)  # fmt: skip


class SamplesDiffer(BaseException):
    """Says that samples answer a condition differently. Not an `Exception`, because models may catch those.

    Args:
        answers: the answer of each sample, in the order of the batch.
    """

    def __init__(self, answers: Sequence[Hashable]) -> None:
        super().__init__("samples answer a condition differently")
        self.answers = list(answers)


def in_groups(run: Callable[[Tensor], Sequence[Tensor]], answers: Sequence[Hashable]) -> list[Tensor]:
    """Runs each group of equal answers by itself and puts the results together.

    Args:
        run: takes positions in the batch, and returns tensors with one row for each.
        answers: one per row of the batch.

    Returns:
        The tensors, with one row per row of the batch.
    """
    groups: dict[Hashable, list[int]] = {}
    for position, answer in enumerate(answers):
        groups.setdefault(answer, []).append(position)
    positions = [torch.tensor(group) for group in groups.values()]
    back = torch.cat(positions).argsort()
    return [torch.cat(parts)[back.to(parts[0].device)] for parts in zip(*map(run, positions), strict=True)]


class Conditions:
    """Replaces the functions that read a tensor's values, or shape their result by them.

    Args:
        anchor: any tensor that depends on the sample, as the model sees it; it tells the engine's vmap from others.

    Attributes:
        replacements: maps torch functions to their replacements.
    """

    def __init__(self, anchor: Tensor) -> None:
        while not _functorch.is_batchedtensor(anchor):  # `torch.func.grad` wraps its arguments once more
            anchor = _functorch.get_unwrapped(anchor)
        self._level = _functorch.maybe_get_level(anchor)
        self.replacements: dict[Any, Callable[..., Any]] = {
            **{function: partial(self._read, function) for function in READS},
            **{function: partial(self._compare, function) for function in _COMPARISONS},
            **{function: partial(self._shape, function) for function in _SHAPED_BY_DATA},
            **{function: partial(self._size, function, 0) for function in _SIZED},
            **{function: partial(self._size, function, 1) for function in _SIZED_METHODS},
            torch.where: self._where,
            Tensor.requires_grad_: self._requires_grad,
            Tensor.__getitem__: self._index,
        }

    def _samples(self, tensor: Any) -> Tensor | None:
        """Returns the plain tensor of all samples, samples first.

        It is None for a value that does not depend on the sample, and for one that a vmap of the model has batched.
        """
        dim = None
        while isinstance(tensor, Tensor) and _functorch.is_functorch_wrapped_tensor(tensor):
            if _functorch.is_batchedtensor(tensor):
                if _functorch.maybe_get_level(tensor) != self._level:
                    return None
                dim = _functorch.maybe_get_bdim(tensor)
            tensor = _functorch.get_unwrapped(tensor)
        return None if dim is None else tensor.movedim(dim, 0)

    def _read(self, function: Callable[..., Any], tensor: Tensor) -> Any:
        samples = self._samples(tensor)
        if samples is None:
            return function(tensor)
        with torch._C._DisableFuncTorch():  # inside `torch.func.grad`, `detach` of torch 2.6 wraps the tensor again
            samples = samples.detach()
            if function is Tensor.tolist or samples[0].numel() == 1:  # else the first sample gets torch's error
                # By repr, in which nan equals nan and -0.0 differs from 0.0.
                _agree([repr(each) for each in samples.tolist()])
            return function(samples[0])

    def _compare(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = self._one_by_one(function, args, kwargs)
        if found is None:
            return function(*args, **kwargs)
        _agree(found)
        return found[0]

    def _shape(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Inside another transform (`torch.func.grad`), the result would lack that transform's wrapper.
        inside = _functorch.peek_interpreter_stack().level() != self._level
        found = None if inside else self._one_by_one(function, args, kwargs)
        if found is None:
            return function(*args, **kwargs)
        flat = [tree_flatten(output) for output in found]
        _agree([(str(form), *(tuple(leaf.shape) for leaf in leaves)) for leaves, form in flat])
        stacked = [torch.stack(row) for row in zip(*(leaves for leaves, _ in flat), strict=True)]
        return tree_unflatten([_functorch._add_batch_dim(each, 0, self._level) for each in stacked], flat[0][1])

    def _one_by_one(self, function: Callable[..., Any], args: Any, kwargs: Any) -> list[Any] | None:
        """Returns the function's result for each sample; None if its arguments do not depend on the sample."""
        flat, form = tree_flatten((args, kwargs))
        columns = [self._samples(leaf) for leaf in flat]
        count = next((len(column) for column in columns if column is not None), None)
        if count is None:
            return None
        rows = [[leaf] * count if c is None else c.unbind() for leaf, c in zip(flat, columns, strict=True)]
        calls = [tree_unflatten(list(row), form) for row in zip(*rows, strict=True)]
        return [function(*own_args, **own_kwargs) for own_args, own_kwargs in calls]

    def _requires_grad(self, tensor: Tensor, requires_grad: bool = True) -> Tensor:
        """Does nothing for a sample's tensor: a leaf more changes no parameter's gradient, and vmap refuses to ask."""
        skipped = requires_grad and self._samples(tensor) is not None
        return tensor if skipped else tensor.requires_grad_(requires_grad)

    def _where(self, *args: Any, **kwargs: Any) -> Any:
        only = len(args) + len(kwargs) == 1  # the form that lists positions
        return self._shape(torch.where, *args, **kwargs) if only else torch.where(*args, **kwargs)

    def _index(self, tensor: Tensor, index: Any) -> Any:
        if isinstance(index, slice | tuple):
            index = self._numbers(index)
        parts = index if isinstance(index, tuple) else (index,)
        masks = [part for part in parts if isinstance(part, Tensor) and part.dtype == torch.bool]
        if any(self._samples(mask) is not None for mask in masks):
            return self._shape(Tensor.__getitem__, tensor, index)
        return tensor[index]

    def _size(self, function: Callable[..., Any], skip: int, *args: Any, **kwargs: Any) -> Any:
        return function(*args[:skip], *self._numbers(args[skip:]), **self._numbers(kwargs))

    def _numbers(self, found: Any) -> Any:
        """Replaces integer tensors that depend on the sample by plain numbers."""
        if isinstance(found, slice):
            return slice(self._numbers(found.start), self._numbers(found.stop), self._numbers(found.step))
        if isinstance(found, tuple | list):
            return type(found)(map(self._numbers, found)) if type(found) in (tuple, list) else found
        if isinstance(found, dict):
            return {key: self._numbers(value) for key, value in found.items()}
        whole = isinstance(found, Tensor) and found.dim() == 0 and found.dtype in (torch.int64, torch.int32)
        return self._read(Tensor.item, found) if whole and self._samples(found) is not None else found


def _agree(found: Sequence[Hashable]) -> None:
    if any(answer != found[0] for answer in found):
        raise SamplesDiffer(found)
