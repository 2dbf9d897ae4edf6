"""The pixel form: inner products of per-sample convolution weight gradients, without forming the gradients.

With U the unfolded patches of an input x and D the gradients of the outputs, G = D^T U and ⟨G, G'⟩ = sum over t, t' of
K[t, t'] ⟨d_t, d_t'⟩ with K = U U'^T. For stride 1 the patches need not be formed. An entry of K is a sum of entries of
the Gram matrix P of single pixels along a diagonal,

    K[t, t'] = sum over kernel offsets o of P[t + o, t' + o]

which is separable over the axes. This costs T^2 (C + p) per inner product instead of T^2 (k C + p), or T k C p for G
itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradconsist._inputs.precision import wide, wide_dtype
from gradconsist.engines.ghost.conv import Geometry
from gradconsist.engines.ghost.gram import cancels


def has_pixel_form(geometry: Geometry) -> bool:
    """Tells whether a convolution has a pixel form."""
    return not geometry.transposed and set(geometry.stride) == {1}


def pixel_gram(x: Tensor, gy: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> Tensor | None:
    """Computes M of the weight gradients of a convolution with stride 1.

    Args:
        x: inputs [N, C, ...], interleaved.
        gy: gradients of the outputs [N, p, ...].
        kernel: spatial size of the weight.
        geometry: geometry of the layer.

    Returns:
        [n, 2, 2], or None if positions cancel so far that float32 would lose accuracy.
    """
    gram, uncancelled = _PixelGram.apply(wide(x), gy.to(wide_dtype(x)), kernel, geometry)
    if cancels(gram.diagonal(dim1=1, dim2=2), uncancelled):
        return None
    result: Tensor = gram
    return result


class _PixelGram(torch.autograd.Function):
    """Computes M from blocks per pair: (w, w) and (s, s) form one batch of N, (w, s) one of n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gy: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> tuple[Tensor, Tensor]:
        blocks = _summed(x, gy, kernel, geometry)
        outputs = _blocks(_positions(gy, geometry))
        own, cross = ((k * q).sum((1, 2, 3)) for k, q in zip(blocks[:2], outputs, strict=True))
        uncancelled = (blocks[0].diagonal(dim1=2, dim2=3) * outputs[0].diagonal(dim1=2, dim2=3)).sum((1, 2))
        gram = own.new_zeros(len(cross), 2, 2)
        gram[:, 0, 0], gram[:, 1, 1], gram[:, 0, 1] = own[0::2], own[1::2], cross
        ctx.save_for_backward(x, gy, *blocks)
        ctx.options = kernel, geometry
        uncancelled = uncancelled.view(-1, 2)
        ctx.mark_non_differentiable(uncancelled)
        return gram, uncancelled

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, gy, *blocks = ctx.saved_tensors
        kernel, geometry = ctx.options
        if torch.is_grad_enabled():  # a derivative of this one is wanted, and the saved blocks have no graph
            blocks = _summed(x, gy, kernel, geometry)
        own = 2.0 * cotangent.diagonal(dim1=1, dim2=2).reshape(-1)
        cross = cotangent[:, 0, 1]
        pulled = [
            _pull(_positions(tensor, geometry), pair[0], pair[1], own, cross).view(tensor.shape) if wanted else None
            for tensor, pair, wanted in zip((x, gy), (blocks[2:], blocks[:2]), ctx.needs_input_grad, strict=False)
        ]
        return pulled[0], pulled[1], None, None


def _positions(tensor: Tensor, geometry: Geometry) -> Tensor:
    """Reshapes to [N, g, channels, T]."""
    return tensor.reshape(len(tensor), geometry.groups, -1, math.prod(tensor.shape[2:]))


def _summed(x: Tensor, gy: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> list[Tensor]:
    """Computes K at output positions, and its counterpart for output gradients at input positions; own and cross."""
    back = [d * (k - 1) - pad for d, k, pad in zip(geometry.dilation, kernel, geometry.padding, strict=True)]
    patches = [
        _diagonal_sums(p, tuple(x.shape[2:]), kernel, geometry.dilation, geometry.padding)
        for p in _blocks(_positions(x, geometry))
    ]
    pixels = [
        _diagonal_sums(q, tuple(gy.shape[2:]), kernel, geometry.dilation, back)
        for q in _blocks(_positions(gy, geometry))
    ]
    return [*patches, *pixels]


def _blocks(a: Tensor) -> list[Tensor]:
    """Computes Gram matrices over positions, [N, g, T, T] and [n, g, T, T], of a [N, g, channels, T]."""
    return [a.transpose(2, 3) @ a, a[0::2].transpose(2, 3) @ a[1::2]]


def _pull(a: Tensor, own: Tensor, cross: Tensor, scale_own: Tensor, scale_cross: Tensor) -> Tensor:
    """Computes the derivative of sum scale * ⟨Gram blocks of a, given blocks⟩ for a."""
    result = (a @ own) * scale_own.view(-1, 1, 1, 1)
    scaled = cross * scale_cross.view(-1, 1, 1, 1)
    result[0::2] += a[1::2] @ scaled.transpose(2, 3)
    result[1::2] += a[0::2] @ scaled
    return result


def _diagonal_sums(
    p: Tensor, size: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...], padding: Any
) -> Tensor:
    """Sums p[t + o, t' + o] over kernel offsets o, zero outside; p [B, g, T, T] with T = prod(size)."""
    dims = len(size)
    p = p.view(*p.shape[:2], *size, *size)
    for axis in range(dims):
        row, column = 2 + axis, 2 + dims + axis
        pad = [0] * (2 * (2 * dims))
        for position in (row, column):
            from_last = p.dim() - 1 - position
            pad[2 * from_last] = pad[2 * from_last + 1] = padding[axis]
        padded = F.pad(p, pad)
        length = padded.shape[row] - dilation[axis] * (kernel[axis] - 1)
        parts = [
            padded.narrow(row, offset, length).narrow(column, offset, length)
            for offset in range(0, dilation[axis] * kernel[axis], dilation[axis])
        ]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        p = total
    positions = math.prod(p.shape[2 : 2 + dims])
    return p.reshape(*p.shape[:2], positions, positions)
