"""BatchNorm's joint statistics: taken before the chunks, and, if wanted, a part of what L_g is differentiated for.

Joint statistics need a forward of all pairs before the first chunk. The gradients that are compared hold these
statistics s constant, so L_g is a function F(p, s) of the parameters p and of s. By the definition its derivative is
that of F for p. But s depends on p, and what a step changes is F(p, s(p)):

    d L_g / dp = dF/dp + (ds/dp)^T dF/ds

The second summand needs dF/ds, which the chunks give like any other derivative, and one forward and backward of all
pairs for the product.
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
_PART_BYTES = 2**22  # of the input of a convolution that takes a batch in parts


class _InParts(TorchFunctionMode):
    """Convolutions take a large batch in parts: oneDNN copies what it gets and what it returns.

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
    if input.dim() != _CONVOLUTIONS[func] or samples >= len(input) or not input.is_contiguous():
        return func(input, *args, **kwargs)
    first = func(input[:samples], *args, **kwargs)
    result: Tensor = first.new_empty(len(input), *first.shape[1:])
    result[:samples] = first
    for start in range(samples, len(input), samples):
        result[start : start + samples] = func(input[start : start + samples], *args, **kwargs)
    return result


def take_statistics(forward: PerSampleForward, weak: Inputs, strong: Inputs) -> None:
    """Records the joint statistics of all weak and strong inputs, by one forward without graph.

    Args:
        forward: its BatchNorm calls answer with these statistics from now on.
        weak: all weak views of a call.
        strong: all strong views.

    Raises:
        InputShapeError: the views cannot be one batch.
    """
    if not concatenable(weak, strong):
        raise InputShapeError(
            "`weak` and `strong` differ in shape, so BatchNorm's joint statistics cannot be taken from one batch: pad"
            " both to one shape, or use `batchnorm='running'`."
        )
    with torch.no_grad(), _InParts():
        forward.output(concatenate(weak, strong), record=True)


def check_through_statistics(wanted: object, batchnorm: BatchNormPolicy, dropout: str) -> None:
    """Refuses options with which there are no statistics of the call's own to differentiate.

    Args:
        wanted: the option `through_statistics`.
        batchnorm: policy.
        dropout: "off" or "on".

    Raises:
        ConfigError: `wanted` is no boolean; the statistics are given, or their forward is another one each time.
    """
    check_choice("through_statistics", wanted, (True, False))
    if not wanted:
        return
    if batchnorm in ("running", "observed") or dropout == "on":
        given = f"batchnorm={batchnorm!r}" if dropout == "off" else "dropout='on'"
        raise ConfigError(
            f"`through_statistics=True` does not go with `{given}`: only joint statistics of the call itself, in a"
            " forward without chance, can be differentiated. Use `batchnorm='auto'` or 'batch' and `dropout='off'`."
        )


def check_can_follow(*, given: bool, half: bool) -> None:
    """Refuses a call whose statistics cannot be differentiated.

    Args:
        given: whether the statistics are the caller's.
        half: whether some of the call is computed in float16.

    Raises:
        ConfigError: one of both.
    """
    if given:
        raise ConfigError(
            "`through_statistics=True` met given `statistics`, whose dependence on the parameters is not known here:"
            " leave one of both out."
        )
    if half:
        raise ConfigError(
            "`through_statistics=True` was not proven in float16, where its parts may underflow: use bfloat16 or"
            " float32."
        )


class StatisticsPath:
    """The joint statistics of a call, on the way from the parameters to L_g.

    Args:
        forward: whose BatchNorm calls answer with recorded statistics.
        weak: all weak views of the call.
        strong: all strong views.
        stand_ins: makes views of the model's parameters, by name.
    """

    def __init__(
        self, forward: PerSampleForward, weak: Inputs, strong: Inputs, stand_ins: Callable[[], dict[str, Tensor]]
    ) -> None:
        self._forward = forward
        self._inputs = weak, strong
        self._stand_ins = stand_ins

    def cut(self) -> list[Tensor]:
        """Puts leaves in the place of the recorded statistics, for which the chunks can be differentiated: for dF/ds.

        Returns:
            Mean and variance of each call.
        """
        calls = self._forward.batchnorm
        calls.recorded = [
            each._replace(mean=each.mean.detach().requires_grad_(), variance=each.variance.detach().requires_grad_())
            for each in calls.recorded or []
        ]
        return _flat(calls.recorded)

    def join(self) -> None:
        """Gives the recorded statistics their graph: nothing is left to add after the chunks.

        Stand-ins of their own lead to the parameters: through those of the chunks, an engine that asks autograd for a
        sample's gradient would get the statistics' part in it, too.
        """
        own = self._forward.parameters
        self._forward.parameters = self._stand_ins()
        try:
            self._record()
        finally:
            self._forward.parameters = own

    def again(self) -> list[Tensor]:
        """The tensors of `cut` with their graph: (ds/dp)^T dF/ds is still owed to chunks that met the leaves."""
        return self._record()

    def _record(self) -> list[Tensor]:
        """The statistics anew, with their graph.

        Raises:
            UnsupportedModuleError: they are others than before.
        """
        calls = self._forward.batchnorm
        before = calls.recorded or []
        self._forward.output(concatenate(*self._inputs), record=True)
        now = calls.recorded or []
        if len(now) != len(before) or not all(map(_about_equal, now, before)):
            raise UnsupportedModuleError(
                "the model's BatchNorm statistics were others when its forward ran again on the same inputs, so"
                " `through_statistics=True` would differentiate another function: its forward depends on something"
                " beside inputs and parameters (a counter, a grad mode). Make it fixed, or leave the option out."
            )
        return _flat(now)


def _about_equal(now: Statistics, before: Statistics) -> bool:
    """Within the rounding of a forward, in units of the values that were averaged: a mean may be all noise."""
    if now.mean.shape != before.mean.shape:
        return False
    tolerance = {torch.float64: 1e-8, torch.float32: 5e-2}[now.mean.dtype]  # float32 also holds those of half types
    squares = float((before.variance + before.mean.square()).detach().max())
    mean, variance = ((a.detach() - b.detach()).abs().max() for a, b in zip(now[:2], before[:2], strict=True))
    return bool(mean <= tolerance * squares**0.5) and bool(variance <= tolerance * squares)


def _flat(statistics: list[Statistics]) -> list[Tensor]:
    return [part for each in statistics for part in (each.mean, each.variance)]
