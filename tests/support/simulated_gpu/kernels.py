"""Operators that exist on CUDA alone, by CPU operators or written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> Any:
    out, used_mean, used_inverse = aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return out, used_mean, used_inverse, torch.empty(0, dtype=torch.uint8)


def _batch_norm_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    mean: Any,
    var: Any,
    used_mean: Any,
    used_inverse: Any,
    eps: float,
    kept: Any,
) -> Any:
    return aten.native_batch_norm_backward(
        grad, x, weight, mean, var, used_mean, used_inverse, True, eps, [True, True, True]
    )


def _rms_norm_backward(grad: Tensor, x: Tensor, shape: Any, inverse: Tensor, weight: Any, wanted: Any) -> Any:
    over, before = list(range(-len(shape), 0)), list(range(x.dim() - len(shape)))
    scaled = grad if weight is None else grad * weight
    dx = inverse * scaled - x * inverse**3 * (scaled * x).mean(over, keepdim=True)
    return dx, (grad * x * inverse).sum(before) if wanted[1] and before else None


def _lstm_cell(a: Tensor, b: Tensor, c: Tensor, bias_a: Tensor | None = None, bias_b: Tensor | None = None) -> Any:
    gates = a + b if bias_a is None else a + b + bias_a + bias_b
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * c + i * g
    return o * new.tanh(), new, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(gh: Any, gc: Any, c: Tensor, new: Tensor, kept: Tensor, has_bias: bool) -> Any:
    i, f, g, o = kept.chunk(4, 1)
    t, gh = new.tanh(), torch.zeros_like(new) if gh is None else gh
    d = gh * o * (1 - t * t) + (0 if gc is None else gc)
    parts = [d * g * i * (1 - i), d * c * f * (1 - f), d * i * (1 - g * g), gh * t * o * (1 - o)]
    gates = torch.cat(parts, 1)
    return gates, d * f, gates.sum(0) if has_bias else None


def _gru_cell(a: Tensor, b: Tensor, h: Tensor, bias_a: Tensor | None = None, bias_b: Tensor | None = None) -> Any:
    if bias_a is not None:
        a, b = a + bias_a, b + bias_b
    (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
    r, z = (ar + br).sigmoid(), (az + bz).sigmoid()
    n = (an + r * bn).tanh()
    return n + z * (h - n), torch.cat([r, z, n, h, bn], 1)


def _gru_cell_backward(gh: Tensor, kept: Tensor, has_bias: bool) -> Any:
    r, z, n, h, bn = kept.chunk(5, 1)
    dz, dn = gh * (h - n) * z * (1 - z), gh * (1 - z) * (1 - n * n)
    dr = dn * bn * r * (1 - r)
    a, b = torch.cat([dr, dz, dn], 1), torch.cat([dr, dz, dn * r], 1)
    return a, b, gh * z, a.sum(0) if has_bias else None, b.sum(0) if has_bias else None


REPLACED = {
    aten.cudnn_batch_norm: _batch_norm,
    aten.cudnn_batch_norm_backward: _batch_norm_backward,
    aten._fused_rms_norm_backward: _rms_norm_backward,
    aten._thnn_fused_lstm_cell: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl: _lstm_cell_backward,
    aten._thnn_fused_gru_cell: _gru_cell,
    aten._thnn_fused_gru_cell_backward: _gru_cell_backward,
    aten._cudnn_rnn_flatten_weight: lambda weights, *rest, **more: torch.empty(0, dtype=weights[0].dtype),
}
