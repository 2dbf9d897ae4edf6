"""Takes BatchNorm's joint statistics before the chunks run, and optionally differentiates L_g through them.

Joint statistics need a forward of all pairs before the first chunk. The compared gradients hold these statistics s
constant, so L_g is a function F(p, s) of the parameters p and of s. By definition its derivative is dF/dp. But s
depends on p, and a step changes F(p, s(p)):

    d L_g / dp = dF/dp + (ds/dp)^T dF/ds

The second term needs dF/ds, which the chunks give like any other derivative, and one forward and backward of all pairs
for the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradconsist._forward.batchnorm import BatchNormPolicy, Statistics
from gradconsist._forward.per_sample import PerSampleForward
from gradconsist._inputs.batch import concatenable, concatenate
from gradconsist._inputs.options import check_choice
from gradconsist.errors import ConfigError, InputShapeError, UnsupportedModuleError
from gradconsist.types import Inputs

_CONVOLUTIONS = {getattr(torch, f"conv{kind}{dims}d"): 2 + dims for kind in ("", "_transpose") for dims in (1, 2, 3)}
_PART_BYTES = 2**22  # input size of one part, for a convolution that takes a batch in parts


class _InParts(TorchFunctionMode):
    """Splits large batches of convolutions into parts, because oneDNN copies inputs and outputs.

    On a WRN-28-2 with 448 images of 32 x 32 the forward peaks at 306 MiB instead of 349 (CPU, one thread).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CONVOLUTIONS:
            return _in_parts(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _in_parts(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    samples = max(1, len(input) * _PART_BYTES // max(1, input.nbytes))
    if (
        input.device.type != "cpu"
        or input.dim() != _CONVOLUTIONS[func]
        or samples >= len(input)
        or not input.is_contiguous()
    ):
        return func(input, *args, **kwargs)
    first = func(input[:samples], *args, **kwargs)
    result: Tensor = first.new_empty(len(input), *first.shape[1:])
    result[:samples] = first
    for start in range(samples, len(input), samples):
        result[start : start + samples] = func(input[start : start + samples], *args, **kwargs)
    return result


def take_statistics(forward: PerSampleForward, weak: Inputs, strong: Inputs) -> None:
    """Records the joint statistics of all weak and strong inputs in one forward without a graph, for later forwards."""
    if not concatenable(weak, strong):
        raise InputShapeError(
            "`weak` and `strong` differ in shape, so BatchNorm's joint statistics cannot be taken from one batch: pad"
            " both to one shape, or use `batchnorm='running'`."
        )
    with torch.no_grad(), _InParts():
        forward.output(concatenate(weak, strong), record=True)


def check_through_statistics(wanted: object, batchnorm: BatchNormPolicy, dropout: str) -> None:
    """Refuses options that leave no statistics of the call to differentiate, or a random forward."""
    check_choice("through_statistics", wanted, (True, False))
    if not wanted:
        return
    if batchnorm in ("running", "observed") or dropout == "on":
        given = f"batchnorm={batchnorm!r}" if dropout == "off" else "dropout='on'"
        raise ConfigError(
            f"`through_statistics=True` does not go with `{given}`: only joint statistics of the call itself, from a"
            " forward that is not random, can be differentiated. Use `batchnorm='auto'` or 'batch' and `dropout='off'`."
        )


def check_can_follow(*, given: bool, half: bool) -> None:
    """Refuses a call whose statistics cannot be differentiated: the caller gave them, or part of it runs in float16."""
    if given:
        raise ConfigError(
            "`through_statistics=True` does not go with given `statistics`, whose dependence on the parameters is not"
            " known here: leave one of the two out."
        )
    if half:
        raise ConfigError(
            "`through_statistics=True` has not been verified in float16, where parts of it may underflow: use bfloat16"
            " or float32."
        )


class StatisticsPath:
    """Differentiates L_g through the joint statistics of a call, which the calls of `forward` use.

    `stand_ins` makes views of the model's parameters, each with its name.
    """

    def __init__(
        self, forward: PerSampleForward, weak: Inputs, strong: Inputs, stand_ins: Callable[[], dict[str, Tensor]]
    ) -> None:
        self._forward = forward
        self._inputs = weak, strong
        self._stand_ins = stand_ins

    def cut(self) -> list[Tensor]:
        """Returns leaf tensors in place of the statistics, so that chunks can be differentiated for them (dF/ds)."""
        calls = self._forward.batchnorm
        calls.recorded = [
            each._replace(
                mean=each.mean.detach().requires_grad_(), variance=each.variance.detach().requires_grad_(), inverse=None
            )
            for each in calls.recorded or []
        ]
        return _flat(calls.recorded)

    def join(self) -> list[Tensor]:
        """Gives the recorded statistics their graph, so that nothing has to be added after the chunks; returns them.

        The graph reaches the parameters through new views. Through the views that the chunks use, an engine that asks
        autograd for a sample's gradient would also get the part of the statistics.
        """
        own = self._forward.parameters
        self._forward.parameters = self._stand_ins()
        try:
            return self._record()
        finally:
            self._forward.parameters = own

    def again(self) -> list[Tensor]:
        """Returns the tensors of `cut` with their graph, to add (ds/dp)^T dF/ds for chunks that used the leaves."""
        return self._record()

    def _record(self) -> list[Tensor]:
        """Records the statistics again, now with their graph, and refuses a model that gives others than before."""
        calls = self._forward.batchnorm
        before = calls.recorded or []
        self._forward.output(concatenate(*self._inputs), record=True)
        now = calls.recorded or []
        if len(now) != len(before) or not all(map(_about_equal, now, before)):
            raise UnsupportedModuleError(
                "the model's BatchNorm statistics changed when its forward ran again on the same inputs, so"
                " `through_statistics=True` would differentiate another function: its forward depends on something"
                " besides inputs and parameters (a counter, a grad mode). Make it fixed, or leave the option out."
            )
        return _flat(now)


def _about_equal(now: Statistics, before: Statistics) -> bool:
    """Tells whether both agree within rounding, relative to the averaged values, since a mean may be all rounding."""
    if now.mean.shape != before.mean.shape:
        return False
    tolerance = {torch.float64: 1e-8, torch.float32: 5e-2}[now.mean.dtype]  # float32 also holds those of half types
    squares = float((before.variance + before.mean.square()).detach().max())
    mean, variance = ((a.detach() - b.detach()).abs().max() for a, b in zip(now[:2], before[:2], strict=True))
    return bool(mean <= tolerance * squares**0.5) and bool(variance <= tolerance * squares)


def _flat(statistics: list[Statistics]) -> list[Tensor]:
    return [part for each in statistics for part in (each.mean, each.variance)]
