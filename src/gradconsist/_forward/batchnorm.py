"""BatchNorm with constant statistics, as an explicit affine map.

With batch statistics a sample's output depends on its neighbours, so "the gradient of one sample" needs a definition.
Ours: the statistics that the forward would use are constants, and are never updated by us. With them BatchNorm is

    y = (x - mean) * scale + beta,    scale = gamma / sqrt(var + eps)

and every engine, per sample or in chunks, computes the same numbers. The fused operator in evaluation mode would do as
well in theory; it has no batching rule under `torch.func.vmap` and an expensive second derivative.

Calls are told apart by their position in the forward, not by module: a layer that runs twice has two sets of
statistics, and a function that calls `F.batch_norm` without a module works like any other.

A call whose input does not grow with the batch normalises no samples, but a parameter (weight standardisation, as timm
writes it) or one map at a time. It is no matter of neighbours: it takes its own statistics, with their graph.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from gradconsist._inputs.precision import wide
from gradconsist.errors import ConfigError, InputShapeError, UnsupportedModuleError

BatchNormPolicy: TypeAlias = Literal["auto", "batch", "running", "observed"]
WEAK, STRONG = 0, 1  # which view a sample is, where the views have constants of their own


class Statistics(NamedTuple):
    """Mean and biased variance of one BatchNorm call, [channels] each.

    Attributes:
        mean: over the batch and all positions.
        variance: likewise.
        rows: leading size of the input that they were taken of; 0 if unknown.
        samples: of the forward that they were taken in; 0 if unknown.
    """

    mean: Tensor
    variance: Tensor
    rows: int = 0
    samples: int = 0


Constants: TypeAlias = "list[Statistics] | tuple[list[Statistics], list[Statistics]]"
"""Constants of a forward's BatchNorm calls: one list for all samples, or one for weak and one for strong views."""


class StatisticsMissingError(Exception):
    """A forward met a BatchNorm in batch mode though no statistics were taken; caught inside the library."""


def batch_statistics(x: Tensor) -> Statistics:
    """Statistics over the batch and all positions, in float32 at least; with the graph of `x`, if it has one.

    Args:
        x: input of a BatchNorm, [B, channels, ...].

    Returns:
        Mean and biased variance.

    Raises:
        InputShapeError: there is one value per channel, whose variance would be 0.
    """
    if x.numel() == x.shape[1]:
        raise InputShapeError(
            f"a BatchNorm in batch mode met one value per channel (input of shape {tuple(x.shape)}): use more pairs per"
            " call, or `batchnorm='running'`."
        )
    dims = [dim for dim in range(x.dim()) if dim != 1]
    values = wide(x)
    # Two sums and not torch.var_mean, which takes as long as a convolution on a CPU; as accurate, since centered.
    mean = values.mean(dims)
    shape = [1, -1] + [1] * (x.dim() - 2)
    if torch.is_grad_enabled() and values.requires_grad:
        return Statistics(mean, (values - mean.view(shape)).square().mean(dims), len(x))
    # By samples, so that no second tensor of the input's size is needed.
    squares = sum((part - mean.view(shape)).square_().sum(dims) for part in values.split(64))
    return Statistics(mean, squares / (x.numel() // x.shape[1]), len(x))


def affine(x: Tensor, statistics: Statistics, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean) * scale + beta`` with constant statistics, in float32 at least, returned in the dtype of `x`."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    # Not x * scale + (bias - mean * scale): where the mean is large that cancels in float32.
    centered = x - statistics.mean.view(shape)
    scale = torch.rsqrt(statistics.variance + eps)
    scale = scale if weight is None else scale * weight
    if torch.is_grad_enabled():
        return scaled(centered, scale, bias, 1).to(x.dtype)
    # The forward that takes statistics has all inputs at once: no copies.
    y = centered.mul_(scale.view(shape))
    return (y if bias is None else y.add_(bias.view(shape))).to(x.dtype)


def scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None, dim: int) -> Tensor:
    """``x * scale + shift`` along dimension `dim` of `x`. Torch function modes see it, like a function of torch."""
    if has_torch_function((x, scale, shift)):
        seen: Tensor = handle_torch_function(scaled, (x, scale, shift), x, scale, shift, dim)
        return seen
    shape = [-1] + [1] * (x.dim() - 1 - dim)
    y = x if scale is None else x * scale.view(shape)
    return y if shift is None else y + shift.view(shape)


def standardized(x: Tensor, dims: int, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over the last `dims` dimensions. Torch function modes see it."""
    if has_torch_function((x,)):
        seen: Tensor = handle_torch_function(standardized, (x,), x, dims, eps)
        return seen
    last = list(range(-dims, 0))
    centered = x - x.mean(last, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(last, keepdim=True) + eps)


def needs_statistics(model: nn.Module, batchnorm: BatchNormPolicy) -> bool:
    """Whether some BatchNorm module of `model` will ask for batch statistics under this policy."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if batchnorm == "running":
        return False
    return any(batchnorm == "batch" or norm.training or norm.running_mean is None for norm in norms)


class BatchNormCalls:
    """Answers the BatchNorm calls of one or more forwards, in the order in which they come.

    While recording, each call in batch mode takes its statistics from its own input. Afterwards the same calls, in the
    same order, get the recorded ones. Where the two views have constants of their own, both are given beforehand.
    """

    def __init__(self, policy: BatchNormPolicy, given: Constants | None = None) -> None:
        self.policy = policy
        self.recorded = _by_view(*given) if isinstance(given, tuple) else given
        self._recording: list[Statistics] | None = None
        self._position = 0
        self._samples = 0
        self._view: Tensor | int | None = None

    def start_forward(self, samples: int, view: Tensor | int | None = None, *, record: bool = False) -> None:
        """Before a forward of so many samples of this view: the next call is the first one."""
        self._position = 0
        self._samples = samples
        self._view = view
        self._recording = [] if record else None

    def finish_forward(self) -> None:
        """After a forward: keeps what was recorded, or checks that every recorded call came.

        Raises:
            UnsupportedModuleError: this forward made fewer calls than the one whose statistics were taken.
        """
        if self._recording is not None:
            self.recorded, self._recording = self._recording, None
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
        """Stands in for `torch.nn.functional.batch_norm`, whose signature it has; buffers are not written."""
        del momentum
        statistics = self._statistics(input, running_mean, running_var, training)
        # Another number of samples and as many rows: these do not belong to samples.
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
        """Stands in for `torch.batch_norm`, which has the same arguments in another order."""
        del cudnn_enabled
        return self(input, running_mean, running_var, weight, bias, training, momentum, eps)

    def _statistics(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool
    ) -> Statistics:
        use_batch = self.policy == "batch" or (self.policy != "running" and training)
        if not use_batch:
            if running_mean is None or running_var is None:
                raise ConfigError(
                    "`batchnorm='running'` met a BatchNorm without running statistics (track_running_stats=False): use"
                    " `batchnorm='auto'` or 'batch'."
                )
            return Statistics(running_mean, running_var)
        if self._recording is not None:
            self._recording.append(batch_statistics(x)._replace(samples=self._samples))
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
                "the views have BatchNorm statistics of their own (`batchnorm='observed'`, a method with several"
                " forwards), and the engine does not say which view a sample is: pass `view` to `Problem.losses`, or"
                " use `batchnorm='auto'`."
            )
        return statistics._replace(
            mean=_row(statistics.mean, self._view), variance=_row(statistics.variance, self._view)
        )

    def _mismatch(self, found: str) -> str:
        expected = len(self.recorded or [])
        return (
            f"the model's BatchNorm calls differ between forwards: {expected} when statistics were taken, {found} now."
            " The model's control flow depends on its input or on chance: make it fixed, or put its BatchNorm layers in"
            " eval mode."
        )


def _row(rows: Tensor, number: Tensor | int) -> Tensor:
    """``rows[number]``, which torch 2.6 cannot batch under vmap where `number` is a tensor."""
    if isinstance(number, int):
        return rows[number]
    return rows.index_select(0, number.reshape(1)).squeeze(0)


def _by_view(weak: list[Statistics], strong: list[Statistics]) -> list[Statistics]:
    """Statistics [2, channels] of each call, weak and strong.

    Args:
        weak: of the calls of the weak views' forward.
        strong: likewise.

    Returns:
        One entry for each call.

    Raises:
        UnsupportedModuleError: the forwards made different calls.
    """
    if [len(each.mean) for each in weak] != [len(each.mean) for each in strong]:
        raise UnsupportedModuleError(
            f"the model's BatchNorm calls differ between the method's own forwards: {len(weak)} with the weak views,"
            f" {len(strong)} with the strong ones, or other channels. Use `batchnorm='auto'`."
        )
    return [
        w._replace(
            mean=torch.stack([w.mean, s.mean]),
            variance=torch.stack([w.variance, s.variance]),
            rows=w.rows if w.rows == s.rows else 0,
        )
        for w, s in zip(weak, strong, strict=True)
    ]
