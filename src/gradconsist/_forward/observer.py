"""Reads BatchNorm's statistics from a method's forwards, without changing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradconsist._forward.batchnorm import Constants, Statistics, batch_statistics
from gradconsist._inputs.batch import members, same_constant
from gradconsist.errors import ConfigError
from gradconsist.types import Inputs, ViewPair


@dataclass
class _Forward:
    """One forward of the model.

    Attributes:
        inputs: its tensor arguments.
        constants: its other arguments, since a flag may change what the model computes.
        statistics: statistics of its BatchNorm calls in batch mode.
    """

    inputs: list[Tensor]
    constants: list[Any]
    statistics: list[Statistics] = field(default_factory=list)

    def holds(self, view: Inputs) -> bool:
        """Tells whether the inputs contain the samples of `view` as one contiguous block, in order."""
        given = [view[name] for name in sorted(view)] if isinstance(view, Mapping) else members(view)
        parts, constants = _sorted_out(given)
        if len(parts) != len(self.inputs) or len(constants) != len(self.constants):
            return False
        if not all(map(same_constant, constants, self.constants)):
            return False
        return any(
            all(_equal(whole[start : start + len(part)], part) for whole, part in zip(self.inputs, parts, strict=True))
            for start in _places(self.inputs[0], parts[0])
        )


class Observer(TorchFunctionMode):
    """Records the BatchNorm calls in batch mode of every forward of `model` inside the block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._forwards: list[_Forward] = []
        self._inside = 0

    def __enter__(self) -> Observer:
        self._hooks = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (args, [kwargs[name] for name in sorted(kwargs)])
        tensors, constants = _sorted_out(tree_leaves(given))
        self._forwards.append(_Forward([tensor.detach() for tensor in tensors if tensor.dim()], constants))
        self._inside += 1

    def _end(self, *_: Any) -> None:
        self._inside -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside and func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            forward = self._forwards[-1]
            with torch.no_grad():
                found = batch_statistics(args[0] if args else kwargs["input"])
            forward.statistics.append(found._replace(samples=len(forward.inputs[0]) if forward.inputs else 0))
        return func(*args, **kwargs)

    def observed(self, pair: ViewPair) -> Constants:
        """Returns the statistics of the forwards in batch mode that the two views went through.

        One entry per BatchNorm call; two such lists if the views went through two forwards. A view that went through
        none, or through several with different statistics, raises a ConfigError.
        """
        found = [forward for forward in self._forwards if forward.statistics]
        weak, strong = (_statistics_of(name, getattr(pair, name), found) for name in ("weak", "strong"))
        return weak if weak is strong else (weak, strong)


def _sorted_out(given: list[Any]) -> tuple[list[Tensor], list[Any]]:
    """Splits arguments into tensors and others."""
    tensors = [part for part in given if isinstance(part, Tensor)]
    return tensors, [part for part in given if not isinstance(part, Tensor)]


def _statistics_of(name: str, view: Inputs, found: list[_Forward]) -> list[Statistics]:
    """Returns the statistics of the forward that the view went through."""
    own = [forward.statistics for forward in found if forward.holds(view)]
    if not own or not all(_same_statistics(own[0], other) for other in own[1:]):
        raise ConfigError(
            "`batchnorm='observed'` needs one forward of the model in train mode that contains all samples of a view in"
            f" one piece, called with the same constants (flags, None). Of {len(found)} in this step, {len(own)} held"
            f" the {name} views of the method's pair. Use `batchnorm='auto'`, or a method that runs such a forward"
            " (FixMatch); calls of the model's parts are not seen."
        )
    if any(each.samples == 1 < each.rows for each in own[0]):
        raise ConfigError(
            "`batchnorm='observed'` found a forward of one sample with a BatchNorm call on several rows, and cannot"
            " tell whether these belong to the sample. Use more pairs per step, or `batchnorm='auto'`."
        )
    return own[0]


def _same_statistics(a: list[Statistics], b: list[Statistics]) -> bool:
    pairs = list(zip(a, b, strict=False))
    return len(a) == len(b) and all(_equal(x.mean, y.mean) and _equal(x.variance, y.variance) for x, y in pairs)


def _places(whole: Tensor, part: Tensor) -> list[int]:
    """Finds where `part` may start in `whole`: its first row is there, and the others have room."""
    room = len(whole) - len(part) + 1
    if room < 1 or not len(part) or whole.shape[1:] != part.shape[1:] or whole.device != part.device:
        return []
    return [int(place) for place in _same(whole[:room], part[:1]).reshape(room, -1).all(1).nonzero()]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(_same(a, b).all())


def _same(a: Tensor, b: Tensor) -> Tensor:
    b = b.to(a.dtype)
    return (a == b) | ((a != a) & (b != b))  # pairs that are not compared may hold NaN
