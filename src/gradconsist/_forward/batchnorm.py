"""BatchNorm with constant statistics, as an explicit affine map.

With batch statistics a sample's output depends on its neighbours, so "the gradient of one sample" needs a definition.
We take the statistics that the forward would use, hold them constant, and never update the running ones. BatchNorm is
then

    y = (x - mean) * scale + beta,    scale = gamma / sqrt(var + eps)

and every engine, per sample or in chunks, computes the same numbers. The fused operator in eval mode would do in
theory, but it has no batching rule under `torch.func.vmap` and an expensive second derivative.

Calls are identified by their position in the forward, not by module. So a layer that runs twice has two sets of
statistics, and a function that calls `F.batch_norm` without a module works too.

If the input of a call does not grow with the batch, the call does not normalise samples but a parameter (weight
standardisation, as timm writes it) or one map at a time. Neighbours do not matter there, so the call uses the
statistics of this input, with their graph.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from gradconsist._inputs.precision import wide
from gradconsist.errors import ConfigError, InputShapeError, UnsupportedModuleError

BatchNormPolicy: TypeAlias = Literal["auto", "batch", "running", "observed"]
WEAK, STRONG = 0, 1  # which view a sample is, if the two views have different constants


class Statistics(NamedTuple):
    """Mean and biased variance of one BatchNorm call, [channels] each.

    Attributes:
        mean: mean over the batch and all positions.
        variance: biased variance over the same.
        rows: first dimension of the call's input; 0 if unknown.
        samples: number of samples in that forward; 0 if unknown.
        inverse: 1 / sqrt(variance + eps), with that call's eps; None if unknown.
    """

    mean: Tensor
    variance: Tensor
    rows: int = 0
    samples: int = 0
    inverse: Tensor | None = None


Constants: TypeAlias = "list[Statistics] | tuple[list[Statistics], list[Statistics]]"
"""Constants for the BatchNorm calls of a forward: one list for all samples, or one for weak and one for strong."""


class StatisticsMissingError(Exception):
    """A BatchNorm ran in batch mode before statistics were taken; caught inside the library."""


def batch_statistics(x: Tensor) -> Statistics:
    """Computes mean and biased variance over batch and positions of `x` [B, channels, ...], in float32 at least.

    They have the graph of `x` if it has one. A single value per channel, whose variance would be 0, is refused.
    """
    _check_several(x)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    values = wide(x)
    # Not torch.var_mean, which takes as long as a convolution on a CPU. Centered sums are as accurate.
    mean = values.mean(dims)
    shape = [1, -1] + [1] * (x.dim() - 2)
    if torch.is_grad_enabled() and values.requires_grad:
        return Statistics(mean, (values - mean.view(shape)).square().mean(dims), len(x))
    # In parts of 64 samples, so that no second tensor of the input's size is needed.
    squares = sum((part - mean.view(shape)).square_().sum(dims) for part in values.split(64))
    return Statistics(mean, squares / (x.numel() // x.shape[1]), len(x))


def _check_several(x: Tensor) -> None:
    if x.numel() == x.shape[1]:
        raise InputShapeError(
            f"a BatchNorm in batch mode got one value per channel (input of shape {tuple(x.shape)}): use more pairs per"
            " call, or `batchnorm='running'`."
        )


def affine(x: Tensor, statistics: Statistics, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Computes ``(x - mean) * scale + beta`` in float32 at least, and returns it in the dtype of `x`."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    # Not x * scale + (bias - mean * scale), which cancels in float32 if the mean is large.
    centered = x - statistics.mean.view(shape)
    inverse = statistics.inverse
    scale = torch.rsqrt(statistics.variance + eps) if inverse is None else inverse
    scale = scale if weight is None else scale * weight
    if torch.is_grad_enabled():
        return scaled(centered, scale, bias, 1).to(x.dtype)
    # In place: the forward that takes statistics holds all inputs at once.
    y = centered.mul_(scale.view(shape))
    return (y if bias is None else y.add_(bias.view(shape))).to(x.dtype)


def scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None, dim: int) -> Tensor:
    """Computes ``x * scale + shift`` along dimension `dim` of `x`; torch function modes see the call."""
    if has_torch_function((x, scale, shift)):
        seen: Tensor = handle_torch_function(scaled, (x, scale, shift), x, scale, shift, dim)
        return seen
    shape = [-1] + [1] * (x.dim() - 1 - dim)
    y = x if scale is None else x * scale.view(shape)
    return y if shift is None else y + shift.view(shape)


def standardized(x: Tensor, dims: int, eps: float) -> Tensor:
    """Computes ``(x - mean) / sqrt(var + eps)`` over the last `dims` dimensions; torch function modes see the call."""
    if has_torch_function((x,)):
        seen: Tensor = handle_torch_function(standardized, (x,), x, dims, eps)
        return seen
    last = list(range(-dims, 0))
    centered = x - x.mean(last, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(last, keepdim=True) + eps)


def needs_statistics(model: nn.Module, batchnorm: BatchNormPolicy) -> bool:
    """Tells whether some BatchNorm module of `model` needs batch statistics under this policy."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if batchnorm == "running":
        return False
    return any(batchnorm == "batch" or norm.training or norm.running_mean is None for norm in norms)


class BatchNormCalls:
    """Replaces the BatchNorm calls of one or more forwards, in the order in which they come.

    While recording, each call in batch mode takes statistics from its input. Later forwards make the same calls in the
    same order and get the recorded statistics. If the two views have different constants, both are passed as `given`.
    """

    def __init__(self, policy: BatchNormPolicy, given: Constants | None = None) -> None:
        self.policy = policy
        self.recorded = _by_view(*given) if isinstance(given, tuple) else given
        self._recording: list[Statistics] | None = None
        self._eps: list[float] = []  # of the calls recorded so far
        self._position = 0
        self._samples = 0
        self._view: Tensor | int | None = None

    def start_forward(self, samples: int, view: Tensor | int | None = None, *, record: bool = False) -> None:
        """Starts a forward of `samples` samples of this view: the next call is the first one."""
        self._position = 0
        self._samples = samples
        self._view = view
        self._recording, self._eps = [] if record else None, []

    def finish_forward(self) -> None:
        """Ends a forward: keeps the recorded statistics, or checks that every recorded call was made."""
        if self._recording is not None:
            self.recorded, self._recording = _with_variances(self._recording, self._eps), None
        elif self.recorded is not None and self._position != len(self.recorded):
            raise UnsupportedModuleError(self._mismatch(f"only {self._position} calls"))

    def __call__(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Replaces `torch.nn.functional.batch_norm`, with the same signature, without writing to buffers."""
        del momentum
        if self._recording is not None and self._uses_batch(training) and _fits_native(input, weight, bias):
            _check_several(input)
            y, mean, inverse = torch.native_batch_norm(input, weight, bias, None, None, True, 0.0, eps)
            self._recording.append(Statistics(mean, inverse, len(input), self._samples, inverse))
            self._eps.append(eps)
            return y
        statistics = self._statistics(input, running_mean, running_var, training)
        # The number of samples differs but the number of rows does not, so the rows are not samples.
        if self._samples != statistics.samples and statistics.rows == len(input):
            channels = wide(input).transpose(0, 1)
            y = standardized(channels.flatten(1), 1, eps).view(channels.shape).transpose(0, 1)
            return scaled(y, weight, bias, 1).to(input.dtype)
        return affine(input, statistics, weight, bias, eps)

    def torch_batch_norm(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        """Replaces `torch.batch_norm`, which takes the arguments in another order."""
        del cudnn_enabled
        return self(input, running_mean, running_var, weight, bias, training, momentum, eps)

    def _uses_batch(self, training: bool) -> bool:
        return self.policy == "batch" or (self.policy != "running" and training)

    def _statistics(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool
    ) -> Statistics:
        if not self._uses_batch(training):
            if running_mean is None or running_var is None:
                raise ConfigError(
                    "`batchnorm='running'` found a BatchNorm without running statistics (track_running_stats=False):"
                    " use `batchnorm='auto'` or 'batch'."
                )
            return Statistics(running_mean, running_var)
        if self._recording is not None:
            self._recording.append(batch_statistics(x)._replace(samples=self._samples))
            self._eps.append(0.0)
            return self._recording[-1]
        if self.recorded is None:
            raise StatisticsMissingError
        if self._position >= len(self.recorded):
            raise UnsupportedModuleError(self._mismatch("more calls"))
        statistics = self._of_view(self.recorded[self._position])
        self._position += 1
        if statistics.mean.shape[0] != x.shape[1]:
            raise UnsupportedModuleError(self._mismatch(f"{x.shape[1]} channels at call {self._position}"))
        return statistics

    def _of_view(self, statistics: Statistics) -> Statistics:
        if statistics.mean.dim() == 1:
            return statistics
        if self._view is None:
            raise ConfigError(
                "the two views have different BatchNorm statistics (`batchnorm='observed'`, a method with several"
                " forwards), and the engine does not say which view a sample is: pass `view` to `Problem.losses`, or"
                " use `batchnorm='auto'`."
            )
        return statistics._replace(
            mean=_row(statistics.mean, self._view), variance=_row(statistics.variance, self._view), inverse=None
        )

    def _mismatch(self, found: str) -> str:
        expected = len(self.recorded or [])
        return (
            f"the model's BatchNorm calls differ between forwards: {expected} when statistics were taken, {found} now."
            " The model's control flow depends on its input or on chance: make it fixed, or put its BatchNorm layers in"
            " eval mode."
        )


def _fits_native(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Tells whether torch's own BatchNorm, one kernel, gives statistics as precise as `batch_statistics`."""
    graph = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, weight, bias))
    alike = all(part is None or part.dtype == x.dtype for part in (weight, bias))
    return not graph and alike and x.dtype in (torch.float32, torch.float64)


def _with_variances(recorded: list[Statistics], eps: list[float]) -> list[Statistics]:
    """Computes the variances of calls that only know `inverse`, of all calls together."""
    places = [place for place, each in enumerate(recorded) if each.inverse is not None]
    if places:
        variances = torch._foreach_pow([recorded[place].variance for place in places], -2.0)
        torch._foreach_sub_(variances, [eps[place] for place in places])
        for place, variance in zip(places, variances, strict=True):
            recorded[place] = recorded[place]._replace(variance=variance)
    return recorded


def _row(rows: Tensor, number: Tensor | int) -> Tensor:
    """Returns ``rows[number]``, which torch 2.6 cannot batch under vmap if `number` is a tensor."""
    if isinstance(number, int):
        return rows[number]
    return rows.index_select(0, number.reshape(1)).squeeze(0)


def _by_view(weak: list[Statistics], strong: list[Statistics]) -> list[Statistics]:
    """Stacks the statistics of both views to [2, channels] for each call, and refuses forwards with different calls."""
    if [len(each.mean) for each in weak] != [len(each.mean) for each in strong]:
        raise UnsupportedModuleError(
            f"the model's BatchNorm calls differ between the method's forwards: {len(weak)} with the weak views and"
            f" {len(strong)} with the strong ones, or the numbers of channels differ. Use `batchnorm='auto'`."
        )
    return [
        w._replace(
            mean=torch.stack([w.mean, s.mean]),
            variance=torch.stack([w.variance, s.variance]),
            rows=w.rows if w.rows == s.rows else 0,
            inverse=None,
        )
        for w, s in zip(weak, strong, strict=True)
    ]
