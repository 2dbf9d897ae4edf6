"""The BatchNorm statistics that a method's own forwards used, read while they run and without changing them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradconsist.batch import leaves
from gradconsist.errors import ConfigError
from gradconsist.normalization import Constants, Statistics, batch_statistics
from gradconsist.types import Inputs, ViewPair


@dataclass
class _Forward:
    """One forward of the model.

    Attributes:
        inputs: the tensors that it was called with.
        statistics: of its BatchNorm calls in batch mode.
    """

    inputs: list[Tensor]
    statistics: list[Statistics] = field(default_factory=list)

    def holds(self, view: Inputs) -> bool:
        """Whether the samples of `view` are, in their order and side by side, among the inputs."""
        parts = leaves(view)
        if len(parts) != len(self.inputs):
            return False
        return any(
            all(_equal(whole[start : start + len(part)], part) for whole, part in zip(self.inputs, parts, strict=True))
            for start in _places(self.inputs[0], parts[0])
        )


class StatisticsObserver(TorchFunctionMode):
    """Records each BatchNorm call in batch mode of each forward of `model` inside the block.

    Args:
        model: the model whose forwards are told apart.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._forwards: list[_Forward] = []
        self._inside = 0

    def __enter__(self) -> StatisticsObserver:
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
        tensors = [leaf.detach() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        self._forwards.append(_Forward(tensors))
        self._inside += 1

    def _end(self, *_: Any) -> None:
        self._inside -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and self._inside and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            with torch.no_grad():
                self._forwards[-1].statistics.append(batch_statistics(args[0] if args else kwargs["input"]))
        return func(*args, **kwargs)

    def statistics(self, pair: ViewPair) -> Constants:
        """The constants of both views: those of the forward in batch mode that each of them went through.

        Args:
            pair: the views that the method compared.

        Returns:
            One entry for each BatchNorm call in batch mode; two lists where the views went through two forwards.

        Raises:
            ConfigError: no forward in batch mode, or several of which it is not clear which one was a view's.
        """
        found = [forward for forward in self._forwards if forward.statistics]
        if len(found) == 1:
            return found[0].statistics
        own = []
        for name, view in (("weak", pair.weak), ("strong", pair.strong)):
            with_view = [forward for forward in found if forward.holds(view)]
            if len(with_view) != 1:
                raise ConfigError(
                    "`batchnorm='observed'` needs, for each view, one forward in train mode that it goes through in"
                    f" one piece; of {len(found)} that the method did in this step, {len(with_view)} held the {name}"
                    " views of its pair. Use `batchnorm='auto'`, or a method that forwards them so (FixMatch)."
                )
            own.append(with_view[0])
        return own[0].statistics if own[0] is own[1] else (own[0].statistics, own[1].statistics)


def _places(whole: Tensor, part: Tensor) -> list[int]:
    """Where in `whole` the first row of `part` is found, with room for the others."""
    room = len(whole) - len(part) + 1
    if room < 1 or not len(part) or whole.shape[1:] != part.shape[1:] or whole.device != part.device:
        return []
    return [int(place) for place in _same(whole[:room], part[:1]).reshape(room, -1).all(1).nonzero()]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(_same(a, b).all())


def _same(a: Tensor, b: Tensor) -> Tensor:
    b = b.to(a.dtype)
    return (a == b) | ((a != a) & (b != b))  # a pair that is left out may hold NaN
