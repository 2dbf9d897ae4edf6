"""Pointwise layers with cheaper second derivatives than torch's.

Torch computes the second derivative of a normalisation with a dozen elementwise nodes, and that of a ReLU with a tensor
of zeros for the input. Here each takes about as many passes over memory as it has results.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ChannelAffine(torch.autograd.Function):
    """Computes y = x * scale + shift: x [N, S, C, S'], scale and shift [N, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return (x * _column(scale)).add_(_column(shift))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, ...] = _ChannelAffineGradient.apply(gy, *ctx.saved_tensors)
        return gradients


class _ChannelAffineGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(gy, x, scale)
        return gy * _column(scale), (x * gy).sum((1, 3)), gy.sum((1, 3))

    @staticmethod
    def backward(ctx: Any, v_x: Tensor, v_scale: Tensor, v_shift: Tensor) -> tuple[Tensor, ...]:
        gy, x, scale = ctx.saved_tensors
        # gx = gy scale,  g_scale = sum gy x,  g_shift = sum gy
        g_gy = (x * _column(v_scale)).addcmul_(v_x, _column(scale)).add_(_column(v_shift))
        return g_gy, gy * _column(v_scale), (v_x * gy).sum((1, 3))


def _column(values: Tensor) -> Tensor:
    return values[:, None, :, None]


class Standardize(torch.autograd.Function):
    """Computes y = (x - mean x) r and r = 1 / sqrt(var x + eps) for each row of x [R, M]; r is [R, 1].

    With the mean m(.) over a row, d x = r (d y - m(d y) - y m(y d y)) - r^2 y d r / M. The first part, S(d y), is
    self-adjoint, so the second derivative uses the same pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, _, r = torch.native_layer_norm(x, x.shape[1:], None, None, eps)
        ctx.save_for_backward(y, r)
        ctx.set_materialize_grads(False)
        return y, r

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gr: Tensor | None) -> tuple[Tensor, None]:
        y, r = ctx.saved_tensors
        gy = torch.zeros_like(y) if gy is None else gy
        gradient: Tensor = _StandardizeGradient.apply(gy, gr, y, r)
        return gradient, None


class _StandardizeGradient(torch.autograd.Function):
    """Computes gx = S(gy) - r^2 y gr / M; gr may be None."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, gr: Tensor | None, y: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(gy, gr, y, r)
        gx = _standardized_back(gy, y, r)
        return gx if gr is None else gx.addcmul_(y, -r.square() * gr / y.shape[1])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gy, gr, y, r = ctx.saved_tensors
        v_x = _standardized_back(v, y, r)
        a, b = (y * gy).mean(1, keepdim=True), (y * v).mean(1, keepdim=True)
        v_r = (v_x * gy).sum(1, keepdim=True) / r  # <v, S(gy)> = <S(v), gy>
        minus = -r
        a, v_gr = minus * a, minus * b
        g_y = (v * a).addcmul_(gy, v_gr)
        if gr is None:
            return v_x, None, g_y, v_r
        along = r * gr
        g_y.addcmul_(v, minus * along / y.shape[1])
        return v_x, r * v_gr, g_y, v_r - 2 * along * b


def _standardized_back(g: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Computes S(g) = r (g - m(g) - y m(y g)), as the derivative of a normalisation of y, which is its own result."""
    zero, one, mask = torch.zeros_like(r), torch.ones_like(r), [True, False, False]
    backward = torch.ops.aten.native_layer_norm_backward
    gradient: Tensor = backward(g.contiguous(), y, y.shape[1:], zero, one, None, None, mask)[0]
    return gradient.mul_(r)


class LeakyRelu(torch.autograd.Function):
    """Computes max(x, slope x) for 0 <= slope <= 1, without the second derivative, which is zero almost everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        y = F.leaky_relu(x, slope) if slope else F.relu(x)
        ctx.save_for_backward(x if slope else y)  # as in torch, so the same tensors may be overwritten later
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
