"""What a method's own forwards used and found, read while they run and without changing them.

BatchNorm's statistics, and what convolutions returned, which the comparison's own forward of the same inputs need not
compute again (`recall`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradconsist.batch import leaves, members, same_constant
from gradconsist.errors import ConfigError
from gradconsist.normalization import Constants, Statistics, batch_statistics
from gradconsist.recall import CONVOLUTIONS, Memory, Output, Recalled, recalled
from gradconsist.types import Inputs, ViewPair


class Observed(NamedTuple):
    """What is known of the forwards that the views of a pair went through.

    Attributes:
        statistics: constants of both views: one entry for each BatchNorm call in batch mode; two lists where the views
            went through two forwards.
        recalled: outputs of convolutions, or None.
    """

    statistics: Constants
    recalled: Recalled | None


@dataclass
class _Forward:
    """One forward of the model.

    Attributes:
        inputs: the tensors that it was called with.
        constants: what else it was called with: a flag may have sent it another way.
        statistics: of its BatchNorm calls in batch mode.
        outputs: of its convolutions.
    """

    inputs: list[Tensor]
    constants: list[Any]
    statistics: list[Statistics] = field(default_factory=list)
    outputs: list[Output | None] = field(default_factory=list)

    def place(self, view: Inputs) -> int | None:
        """Row of the first sample of `view` where all are, in their order and side by side, among the inputs."""
        given = [view[name] for name in sorted(view)] if isinstance(view, Mapping) else members(view)
        parts, constants = _sorted_out(given)
        if len(parts) != len(self.inputs) or len(constants) != len(self.constants):
            return None
        if not all(map(same_constant, constants, self.constants)):
            return None
        for start in _places(self.inputs[0], parts[0]):
            pairs = zip(self.inputs, parts, strict=True)
            if all(_equal(whole[start : start + len(part)], part) for whole, part in pairs):
                return start
        return None


class Observer(TorchFunctionMode):
    """Records each BatchNorm call in batch mode, and convolutions, of each forward of `model` inside the block.

    Args:
        model: the model whose forwards are told apart.
        keep: bytes of outputs of convolutions that may be kept.
    """

    def __init__(self, model: nn.Module, *, keep: int = 0) -> None:
        super().__init__()
        self._model = model
        self._forwards: list[_Forward] = []
        self._inside = 0
        self._memory = Memory(keep)
        self._parameters = self._named()
        self._ids = {id(parameter) for parameter in self._parameters.values()}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # parameters, and their values as convolutions met them

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
        if not self._inside:
            return func(*args, **kwargs)
        forward = self._forwards[-1]
        samples = len(forward.inputs[0]) if forward.inputs else 0
        if func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            with torch.no_grad():
                found = batch_statistics(args[0] if args else kwargs["input"])
            forward.statistics.append(found._replace(samples=samples))
        result = func(*args, **kwargs)
        if func in CONVOLUTIONS and not self._memory.full:
            known = self._same_weight(args[1] if len(args) > 1 else kwargs["weight"])
            forward.outputs.append(self._memory.output(func, result, args, kwargs, samples) if known else None)
        return result

    def _same_weight(self, weight: Tensor) -> bool:
        """Whether a convolution's weight is a parameter of the model, with the value that it had in earlier ones."""
        if id(weight) not in self._ids:
            return False  # made by the model: of parameters that may change
        if id(weight) not in self._before:
            self._before[id(weight)] = weight, weight.detach().clone()
        return self._before[id(weight)][1].equal(weight)

    def _unchanged(self) -> bool:
        """Whether what convolutions returned is what they would return now: `.data` tells no version."""
        now = self._named()
        same = now.keys() == self._parameters.keys() and all(now[name] is p for name, p in self._parameters.items())
        return same and all(before.equal(weight) for weight, before in self._before.values())

    def _named(self) -> dict[str, Tensor]:
        return dict(self._model.named_parameters(remove_duplicate=False))

    def observed(self, pair: ViewPair) -> Observed:
        """What was seen of the forwards in batch mode that the two views went through.

        Args:
            pair: the views that the method compared.

        Returns:
            Their statistics, and outputs of convolutions.

        Raises:
            ConfigError: no forward in batch mode, or several of which it is not clear which one was a view's.
        """
        found = [forward for forward in self._forwards if forward.statistics]
        (weak, first), (strong, second) = (_forward_of(name, getattr(pair, name), found) for name in ("weak", "strong"))
        statistics: Constants = weak.statistics if weak is strong else (weak.statistics, strong.statistics)
        if self._memory.full or not self._unchanged():
            return Observed(statistics, None)
        return Observed(statistics, recalled(weak.outputs, strong.outputs, (first, second), len(leaves(pair.weak)[0])))


def _sorted_out(given: list[Any]) -> tuple[list[Tensor], list[Any]]:
    """The tensors, and what is none."""
    tensors = [part for part in given if isinstance(part, Tensor)]
    return tensors, [part for part in given if not isinstance(part, Tensor)]


def _forward_of(name: str, view: Inputs, found: list[_Forward]) -> tuple[_Forward, int]:
    """The forward that the view went through, and the row of its first sample."""
    own = [(forward, place) for forward in found if (place := forward.place(view)) is not None]
    if not own or not all(_same_statistics(own[0][0].statistics, other.statistics) for other, _ in own[1:]):
        raise ConfigError(
            "`batchnorm='observed'` needs, for each view, one forward of the model in train mode that it goes through"
            f" in one piece, called with the same constants (flags, None); of {len(found)} that the method did in this"
            f" step, {len(own)} held the {name} views of its pair. Use `batchnorm='auto'`, or a method that forwards"
            " them so (FixMatch); calls of the model's parts are not seen."
        )
    if any(each.samples == 1 < each.rows for each in own[0][0].statistics):
        raise ConfigError(
            "`batchnorm='observed'` met one sample alone in a forward, and a BatchNorm call on more rows than that: it"
            " cannot be told whether these are the sample's. Use more pairs a step, or `batchnorm='auto'`."
        )
    return own[0]


def _same_statistics(a: list[Statistics], b: list[Statistics]) -> bool:
    pairs = list(zip(a, b, strict=False))
    return len(a) == len(b) and all(_equal(x.mean, y.mean) and _equal(x.variance, y.variance) for x, y in pairs)


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
