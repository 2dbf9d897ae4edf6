"""Pointwise layers whose stock second derivatives cost more than they must.

Torch forms the derivative of BatchNorm's affine map from five elementwise nodes, and the second derivative of a ReLU
with a tensor of zeros for the input. Both are done here in as few passes as there are results.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ChannelAffine(torch.autograd.Function):
    """y = (x - mean) * scale + shift: x [N, C, S], mean, scale and shift [N, C]; no derivative for the mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, scale)
        return (x - _column(mean)).mul_(_column(scale)).add_(_column(shift))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        gx, g_scale, g_shift = _ChannelAffineGradient.apply(gy, *ctx.saved_tensors)
        return gx, None, g_scale, g_shift


class _ChannelAffineGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(gy, x, mean, scale)
        g_shift = gy.sum(2)
        # Centered before it is summed: where the mean is large, the difference of two sums would cancel.
        g_scale = (x - _column(mean)).mul_(gy).sum(2)
        return gy * _column(scale), g_scale, g_shift

    @staticmethod
    def backward(ctx: Any, v_x: Tensor, v_scale: Tensor, v_shift: Tensor) -> tuple[Tensor | None, ...]:
        gy, x, mean, scale = ctx.saved_tensors
        # gx = gy scale,  g_scale = sum gy (x - mean),  g_shift = sum gy
        g_gy = (x - _column(mean)).mul_(_column(v_scale)).addcmul_(v_x, _column(scale)).add_(_column(v_shift))
        return g_gy, gy * _column(v_scale), None, (v_x * gy).sum(2)


def _column(values: Tensor) -> Tensor:
    return values.unsqueeze(2)


class LeakyRelu(torch.autograd.Function):
    """max(x, slope x) for 0 <= slope <= 1; its second derivative is zero almost everywhere, and left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        y = F.leaky_relu(x, slope) if slope else F.relu(x)
        ctx.save_for_backward(x if slope else y)  # as torch does: what may be overwritten later is the same
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        gradient: Tensor = _LeakyReluGradient.apply(gy, x, ctx.slope)
        return gradient, None


class _LeakyReluGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return _masked(gy, x, slope)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        gradient: Tensor = _LeakyReluGradient.apply(v, x, ctx.slope)
        return gradient, None, None


def _masked(g: Tensor, x: Tensor, slope: float) -> Tensor:
    if slope:
        leaky: Tensor = torch.ops.aten.leaky_relu_backward(g, x, slope, False)
        return leaky
    relu: Tensor = torch.ops.aten.threshold_backward(g, x, 0)
    return relu
