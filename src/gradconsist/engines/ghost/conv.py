"""Convolution with efficient higher derivatives, and the per-sample gradients of its weights.

Torch differentiates the derivative of a convolution through convolutions whose kernel is a whole feature map, and
through a loop over groups. The three functions below are each other's derivatives, and each is one native call:

    Convolution(x, w) -> y        derivatives: InputGradient, WeightGradient
    InputGradient(gy, w) -> gx    derivatives: Convolution, WeightGradient
    WeightGradient(x, gy) -> gw   derivatives: InputGradient, Convolution

A per-sample weight gradient is a WeightGradient with the samples as groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Stage:
    """Tells convolutions which derivative is being taken.

    Attributes:
        outputs_only: whether it is the first one, for layer outputs only. It needs no gradients of weights, but a
            custom function cannot see that by itself.
    """

    outputs_only: bool = False


@dataclass(frozen=True)
class Geometry:
    """The settings of a convolution: the arguments of `torch.convolution` after the bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = field(default=())
    groups: int = 1

    def arguments(self) -> tuple[Any, ...]:
        """Returns the arguments in torch's order."""
        output_padding = self.output_padding or (0,) * len(self.stride)
        return (*map(list, (self.stride, self.padding, self.dilation)), self.transposed, output_padding, self.groups)

    def for_samples(self, count: int) -> Geometry:
        """Returns the same geometry with `count` times the groups."""
        return replace(self, groups=count * self.groups)


class Convolution(torch.autograd.Function):
    """Computes y = conv(x, w): x [B, C, ...], w in torch's layout, y [B, p, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, geometry: Geometry, stage: Stage | None = None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry, ctx.stage = geometry, stage
        return torch.convolution(x, w, None, *geometry.arguments())

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        gx = gw = None
        if ctx.needs_input_grad[0]:
            gx = InputGradient.apply(gy, w, x.shape, ctx.geometry)
        if ctx.needs_input_grad[1] and not (ctx.stage and ctx.stage.outputs_only):
            gw = WeightGradient.apply(x, gy, w.shape, ctx.geometry)
        return gx, gw, None, None


class InputGradient(torch.autograd.Function):
    """Computes the gradient of ⟨gy, conv(x, w)⟩ for x, whose shape is given."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, w: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
        ctx.save_for_backward(gy, w)
        ctx.geometry = geometry
        return _derivative(gy, gy.new_empty(shape), w, geometry, 0)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, w = ctx.saved_tensors
        g_gy = Convolution.apply(v, w, ctx.geometry) if ctx.needs_input_grad[0] else None
        g_w = WeightGradient.apply(v, gy, w.shape, ctx.geometry) if ctx.needs_input_grad[1] else None
        return g_gy, g_w, None, None


class WeightGradient(torch.autograd.Function):
    """Computes the gradient of ⟨gy, conv(x, w)⟩ for w, whose shape is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gy: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, gy)
        ctx.geometry = geometry
        return _derivative(gy, x, gy.new_empty(shape), geometry, 1)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        x, gy = ctx.saved_tensors
        g_x = InputGradient.apply(gy, v, x.shape, ctx.geometry) if ctx.needs_input_grad[0] else None
        g_gy = Convolution.apply(x, v, ctx.geometry) if ctx.needs_input_grad[1] else None
        return g_x, g_gy, None, None


def _derivative(gy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, which: int) -> Tensor:
    mask = [position == which for position in range(3)]
    result: Tensor = torch.ops.aten.convolution_backward(gy, x, w, None, *geometry.arguments(), mask)[which]
    return result


def sample_gradients(x: Tensor, gy: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    """Computes per-sample weight gradients [N, *shape] with one grouped convolution.

    Takes inputs [N, b, C, ...], b maps per sample, and output gradients [N, b, p, ...].
    """
    n = x.shape[0]
    per_sample = (n * shape[0], *shape[1:])
    # [N, b, C, ...] -> [b, N C, ...]: samples become groups
    folded = (tensor.transpose(0, 1).flatten(1, 2) for tensor in (x, gy))
    gradient: Tensor = WeightGradient.apply(*folded, per_sample, geometry.for_samples(n))
    return gradient.view(n, *shape)


def per_sample_convolution(x: Tensor, w: Tensor, geometry: Geometry, stage: Stage | None = None) -> Tensor:
    """Convolves each sample [b, C, ...] with its own weight; returns [N, b, p, ...].

    Without a stage the weights' gradient is always wanted.
    """
    n = x.shape[0]
    folded = x.transpose(0, 1).flatten(1, 2)
    y: Tensor = Convolution.apply(folded, w.flatten(0, 1), geometry.for_samples(n), stage)
    return y.unflatten(1, (n, -1)).transpose(0, 1)


def normal_form(
    input: Tensor,
    dims: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    *,
    kernel: Sequence[int],
    output_padding: Any = 0,
    transposed: bool = False,
) -> tuple[Tensor, Geometry]:
    """Brings the arguments of ``F.conv*d``, which come in several forms, into one form.

    Returns the input [..., C, spatial], padded if "same" is asymmetric, and the geometry.
    """
    stride, dilation, output_padding = (_ints(value, dims) for value in (stride, dilation, output_padding))
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            sides = [side for t in reversed(total) for side in (0, t % 2)]
            input = F.pad(input, sides)
        padding = [t // 2 for t in total]
    return input, Geometry(stride, _ints(padding, dims), dilation, transposed, output_padding, groups)


def _ints(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * (dims if len(value) == 1 else 1)
