"""Computes the loss from inner products: plain tensors, without models or layers.

Every engine returns the same three numbers per pair, and the rest is computed from them here:

    weak = ||g_w||^2      strong = ||g_s||^2      cross = ⟨g_w, g_s⟩      GC = cross / sqrt(weak * strong)

What a pair adds to the loss is a `Criterion`: 1 - GC, or another function of the three numbers.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gradconsist.types import GradProducts


def degenerate_pairs(products: GradProducts, min_norm: float) -> Tensor:
    """Finds pairs [B] whose cosine is noise: ||g_w|| <= min_norm or ||g_s|| <= min_norm.

    The derivative of the cosine grows like 1/||g||. Semi-supervised methods select confident samples, whose gradients
    vanish, so this case is common.
    """
    return (products.weak.detach().sqrt() <= min_norm) | (products.strong.detach().sqrt() <= min_norm)


def cosine(products: GradProducts, degenerate: Tensor) -> Tensor:
    """Computes GC = ⟨g_w, g_s⟩ / (||g_w|| ||g_s||) [B], and 0 with a zero derivative for degenerate pairs.

    The norms divide one after the other: their product can overflow or underflow where the norms do not, and so can the
    derivative of `rsqrt`, weak^(-3/2). The value is clamped to [-1, 1], since rounding can exceed these bounds by a few
    units in the last place. The derivative is not clamped, so a pair at a bound still contributes to the gradient.
    """
    # Double `where`: a value masked after a division by zero still sends NaN backwards.
    one = torch.ones_like(products.weak)
    weak = torch.where(degenerate, one, products.weak)
    strong = torch.where(degenerate, one, products.strong)
    cross = torch.where(degenerate, torch.zeros_like(products.cross), products.cross)
    value = cross / weak.sqrt() / strong.sqrt()
    return value + (value.clamp(-1.0, 1.0) - value).detach()


class Criterion(Protocol):
    """Defines what a pair adds to the loss, as a function of its inner products."""

    def terms(self, products: GradProducts, similarity: Tensor, degenerate: Tensor) -> Tensor:
        """Returns the terms [B] before their weights, from the products and their cosines (0 for degenerate pairs)."""
        ...

    def steepness(self, norm_weak: Tensor, norm_strong: Tensor) -> Tensor:
        """Estimates the size [B] of the derivative of a term for its two gradients, which must fit into float16."""
        ...


class Disagreement:
    """Adds 1 - GC per pair; 0 for degenerate pairs, whose cosine is noise."""

    def terms(self, products: GradProducts, similarity: Tensor, degenerate: Tensor) -> Tensor:
        """See `Criterion.terms`."""
        del products
        return (1.0 - similarity).masked_fill(degenerate, 0.0)

    def steepness(self, norm_weak: Tensor, norm_strong: Tensor) -> Tensor:
        """Returns 1 / ||g|| of the smaller gradient."""
        return 1.0 / torch.minimum(norm_weak, norm_strong)


class SquaredNorms:
    """Adds (||g_w||^2 + ||g_s||^2) / 2 per pair; smooth at 0, so no pair is left out."""

    def terms(self, products: GradProducts, similarity: Tensor, degenerate: Tensor) -> Tensor:
        """See `Criterion.terms`."""
        del similarity, degenerate
        return 0.5 * products.weak + 0.5 * products.strong  # halved first, since the sum may overflow

    def steepness(self, norm_weak: Tensor, norm_strong: Tensor) -> Tensor:
        """Returns ||g|| of the larger gradient."""
        return torch.maximum(norm_weak, norm_strong)
