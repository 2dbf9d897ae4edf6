"""Inner products of per-sample convolution weight gradients, without forming the gradients.

With U the unfolded patches of an input x and D the gradients of the outputs, G = D^T U and ⟨G, G'⟩ = sum over t, t' of
K[t, t'] ⟨d_t, d_t'⟩ with K = U U'^T. The patch form computes just that, which pays for a strided convolution with few
output positions. For stride 1 there is the pixel form, in which the patches need not be formed. An entry of K is a sum
of entries of the Gram matrix P of single pixels along a diagonal,

    K[t, t'] = sum over kernel offsets o of P[t + o, t' + o]

which is separable over the axes. This costs T^2 (C + p) per inner product instead of T^2 (k C + p), or T k C p for G
itself.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradconsist._inputs.precision import wide, wide_dtype
from gradconsist.engines.ghost.conv import Geometry
from gradconsist.engines.ghost.gram import Doubts, doubt, position_gram


def has_pixel_form(geometry: Geometry) -> bool:
    """Tells whether a convolution has a pixel form."""
    return not geometry.transposed and set(geometry.stride) == {1}


def has_patch_form(geometry: Geometry) -> bool:
    """Tells whether a convolution has a patch form: torch unfolds images, and sequences as images of one row."""
    return not geometry.transposed and geometry.groups == 1 and len(geometry.stride) <= 2


def patch_gram(
    x: Tensor, gy: Tensor, kernel: tuple[int, ...], geometry: Geometry, doubts: Doubts | None = None
) -> Tensor:
    """Computes M of the weight gradients of a convolution with any stride; takes the arguments of `pixel_gram`."""
    row = len(geometry.stride) == 1
    image = wide(x).unsqueeze(2) if row else wide(x)
    sides = (kernel, geometry.dilation, geometry.padding, geometry.stride)
    size, dilation, padding, stride = (
        (least, *side) if row else side for side, least in zip(sides, (1, 1, 0, 1), strict=True)
    )
    patches = F.unfold(image, size, dilation, padding, stride)
    return position_gram(patches.transpose(1, 2), gy.flatten(2).transpose(1, 2), doubts)


def pixel_gram(
    x: Tensor, gy: Tensor, kernel: tuple[int, ...], geometry: Geometry, doubts: Doubts | None = None
) -> Tensor:
    """Computes M [n, 2, 2] of the weight gradients of a convolution with stride 1.

    Takes inputs [N, C, ...] and gradients of the outputs [N, p, ...], interleaved, and the spatial size of the kernel.
    """
    gram: Tensor
    gram, uncancelled = _PixelGram.apply(wide(x), gy.to(wide_dtype(x)), kernel, geometry)
    doubt(doubts, gram, uncancelled)
    return gram


class _PixelGram(torch.autograd.Function):
    """Computes M from three blocks per pair, (w, w), (w, s) and (s, s), as one batch [3n, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gy: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> tuple[Tensor, Tensor]:
        patches, pixels, outputs = _summed(x, gy, kernel, geometry)
        n = len(x) // 2
        ww, ws, ss = (patches * outputs).sum((1, 2, 3)).chunk(3)
        k, q = (each.diagonal(dim1=2, dim2=3) for each in (patches, outputs))
        uncancelled = (k * q).sum((1, 2)).view(3, n)[::2].t()
        ctx.save_for_backward(x, gy, patches, pixels)
        ctx.options = kernel, geometry
        ctx.mark_non_differentiable(uncancelled)
        return torch.stack([ww, ws, ws, ss], 1).view(-1, 2, 2), uncancelled

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, gy, patches, pixels = ctx.saved_tensors
        kernel, geometry = ctx.options
        if torch.is_grad_enabled():  # a derivative of this one is wanted, and the saved blocks have no graph
            patches, pixels, _ = _summed(x, gy, kernel, geometry)
        # Twice ww and ss; ws from both of its places.
        both = cotangent + cotangent.transpose(1, 2)
        scale = torch.cat([both[:, 0, 0], both[:, 0, 1], both[:, 1, 1]]).view(-1, 1, 1, 1)
        pulled = [
            _pull(_positions(tensor, geometry), blocks * scale).view(tensor.shape) if wanted else None
            for tensor, blocks, wanted in zip((x, gy), (pixels, patches), ctx.needs_input_grad, strict=False)
        ]
        return pulled[0], pulled[1], None, None


def _positions(tensor: Tensor, geometry: Geometry) -> Tensor:
    """Reshapes to [N, g, channels, T]."""
    return tensor.reshape(len(tensor), geometry.groups, -1, math.prod(tensor.shape[2:]))


def _summed(x: Tensor, gy: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Computes K at output positions, its counterpart for output gradients at input positions, and their blocks."""
    back = [d * (k - 1) - pad for d, k, pad in zip(geometry.dilation, kernel, geometry.padding, strict=True)]
    inputs, outputs = (_blocks(_positions(tensor, geometry)) for tensor in (x, gy))
    sums = partial(_diagonal_sums, kernel=kernel, dilation=geometry.dilation)
    if x.shape[2:] == gy.shape[2:] and back == list(geometry.padding):  # alike, so with one call
        patches, pixels = sums(torch.cat([inputs, outputs]), tuple(x.shape[2:]), padding=back).chunk(2)
        return patches, pixels, outputs
    patches = sums(inputs, tuple(x.shape[2:]), padding=geometry.padding)
    return patches, sums(outputs, tuple(gy.shape[2:]), padding=back), outputs


def _blocks(a: Tensor) -> Tensor:
    """Computes Gram matrices over positions of a [N, g, channels, T]: (w, w), (w, s) and (s, s), [3n, g, T, T]."""
    weak, strong = a[0::2], a[1::2]
    rows = torch.cat([weak, weak, strong, strong])
    return rows[: -len(strong)].transpose(2, 3) @ rows[len(weak) :]


def _pull(a: Tensor, blocks: Tensor) -> Tensor:
    """Computes the derivative of ⟨Gram blocks of a, given blocks⟩ for a; blocks (w, w) and (s, s) count twice."""
    ww, ws, ss = blocks.chunk(3)
    # One matrix product over the positions of both views.
    pair = torch.cat([a[0::2], a[1::2]], 3)
    for_weak, for_strong = pair @ torch.cat([ww, ws.transpose(2, 3)], 2), pair @ torch.cat([ws, ss], 2)
    return torch.stack([for_weak, for_strong], 1).flatten(0, 1)


def _diagonal_sums(
    p: Tensor, size: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...], padding: Any
) -> Tensor:
    """Sums p[t + o, t' + o] over kernel offsets o, zero outside; p [B, g, T, T] with T = prod(size)."""
    dims = len(size)
    p = p.view(*p.shape[:2], *size, *size)
    for axis in range(dims):
        row, column = 2 + axis, 2 + dims + axis
        length, step = p.shape[row], dilation[axis]
        count = length + 2 * padding[axis] - step * (kernel[axis] - 1)
        shifts = [offset * step - padding[axis] for offset in range(kernel[axis])]
        if shifts == [0]:
            continue
        if count == length and 0 in shifts:  # all of p, as in the middle of a kernel
            shifts.remove(0)
            total = p.clone()
        else:
            total = p.new_zeros([count if dim in (row, column) else each for dim, each in enumerate(p.shape)])
        # By parts that lie inside, since a padded p would be many times as large where the dilation is.
        for shift in shifts:
            first, last = max(0, -shift), min(count, length - shift)
            if first < last:
                inside = p.narrow(row, first + shift, last - first).narrow(column, first + shift, last - first)
                total.narrow(row, first, last - first).narrow(column, first, last - first).add_(inside)
        p = total
    positions = math.prod(p.shape[2 : 2 + dims])
    return p.reshape(*p.shape[:2], positions, positions)
