"""Computes Gram matrices of pairs: the three inner products of a weak and a strong view's gradients.

Samples are interleaved, w0, s0, w1, s1, ..., so a tensor of N = 2 n rows can be read as n pairs without a copy. Every
rule returns, for its parameter, the matrices

    M_i = [[||g_w||^2, ⟨g_w, g_s⟩], [⟨g_s, g_w⟩, ||g_s||^2]]        [n, 2, 2]

of which only the upper triangle is used. Matrices of different parameters add up.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradconsist._inputs.precision import wide


def interleaved(weak: Tensor, strong: Tensor) -> Tensor:
    """Joins w0, w1, ... and s0, s1, ... to w0, s0, w1, s1, ..."""
    return torch.stack([weak, strong], 1).flatten(0, 1)


class _RowGram(torch.autograd.Function):
    """Maps rows [n, r, K] to rows rows^T [n, r, r]. Autograd would form the two terms of the derivative separately."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return torch.bmm(cotangent + cotangent.transpose(1, 2), rows)


def row_gram(rows: Tensor) -> Tensor:
    """Computes inner products [n, r, r] of the rows of each matrix [n, r, K], in float32 at least."""
    gram: Tensor = _RowGram.apply(wide(rows))
    return gram


class _PairGram(_RowGram):
    """Does the same for r = 2 with pairwise sums, because a matrix product over a long K loses digits."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        weak, strong = rows.unbind(1)
        ww, ss = (rows * rows).sum(2).unbind(1)
        ws = (weak * strong).sum(1)
        return torch.stack([ww, ws, ws, ss], 1).view(-1, 2, 2)


class _GramOfTwo(torch.autograd.Function):
    """Does the same for views [n, K] that come separately, without a copy that joins them."""

    @staticmethod
    def forward(ctx: Any, weak: Tensor, strong: Tensor) -> Tensor:
        ctx.save_for_backward(weak, strong)
        ww, ws, ss = ((a * b).sum(1) for a, b in ((weak, weak), (weak, strong), (strong, strong)))
        return torch.stack([ww, ws, ws, ss], 1).view(-1, 2, 2)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        weak, strong = ctx.saved_tensors
        both = (cotangent + cotangent.transpose(1, 2)).unsqueeze(3)  # [n, 2, 2, 1]
        return tuple(
            torch.addcmul(row[:, 0] * weak, row[:, 1], strong) if wanted else None
            for row, wanted in zip(both.unbind(1), ctx.needs_input_grad, strict=True)
        )


def pair_gram(*gradients: Tensor) -> Tensor:
    """Computes M [n, 2, 2] from interleaved gradients [N, ...]; those of several parameters are one vector."""
    rows = [wide(part.reshape(part.shape[0] // 2, 2, -1)) for part in gradients]
    gram: Tensor = _PairGram.apply(torch.cat(rows, 2) if len(rows) > 1 else rows[0])
    return gram


def pair_gram_of_two(weak: Tensor, strong: Tensor) -> Tensor:
    """Computes the same from the gradients [n, ...] of one parameter in views that come separately."""
    gram: Tensor = _GramOfTwo.apply(*(wide(view.flatten(1)) for view in (weak, strong)))
    return gram


# If positions cancel, ||sum_t d_t a_t^T||^2 is much smaller than sum_t ||d_t||^2 ||a_t||^2. Its rounding error scales
# with the latter, so it is no longer small. In float32, 6e-8 * 64 keeps the cosine well within 2e-5.
WORST_CANCELLATION = 64.0


def position_gram(inputs: Tensor, outputs: Tensor, doubts: Doubts | None = None) -> Tensor:
    """Computes M [n, 2, 2] of G = sum_t d_t a_t^T without forming G: sum over t, t' of ⟨a_t, a_t'⟩ ⟨d_t, d_t'⟩.

    Takes inputs a [N, T, features in] and gradients d of the outputs [N, T, features out], interleaved.
    """
    samples, positions = inputs.shape[:2]
    n = samples // 2
    products = row_gram(inputs.reshape(n, 2 * positions, -1)) * row_gram(outputs.reshape(n, 2 * positions, -1))
    gram = products.view(n, 2, positions, 2, positions).sum((2, 4))
    if positions > 1:
        doubt(doubts, gram, products.detach().diagonal(dim1=1, dim2=2).view(n, 2, -1).sum(2))
    return gram


Doubts: TypeAlias = "list[tuple[Tensor, Tensor]]"
"""Squared norms [n, 2] of uses of a float32 form, each with what its positions add to it by themselves."""


def doubt(doubts: Doubts | None, gram: Tensor, uncancelled: Tensor) -> None:
    """Adds to `doubts` what tells whether positions cancel so far that float32 loses accuracy; reads nothing.

    `uncancelled` [n, 2] is the sum over positions of what each adds to the squared norm by itself. Nothing is added in
    float64, or where M [n, 2, 2] is taken unchecked (None).
    """
    if doubts is not None and gram.dtype != torch.float64:
        doubts.append((gram.detach().diagonal(dim1=1, dim2=2), uncancelled.detach()))


def lost(doubts: Doubts) -> list[bool]:
    """Tells for each entry whether accuracy was lost, with one read for all."""
    if not doubts:
        return []
    squared_norms, uncancelled = (torch.stack(parts) for parts in zip(*doubts, strict=True))
    answers: list[bool] = (squared_norms * WORST_CANCELLATION < uncancelled).flatten(1).any(1).tolist()
    return answers
