"""From inner products to the loss: pure tensors, ignorant of models and layers.

Every engine returns the same three numbers per pair, and everything that follows is written here once:

    weak = ||g_w||^2      strong = ||g_s||^2      cross = ⟨g_w, g_s⟩      GC = cross / sqrt(weak * strong)

What a pair adds to the loss is a `Criterion`: 1 - GC, or another function of the three numbers.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gradconsist.types import GradProducts


def degenerate_pairs(products: GradProducts, min_norm: float) -> Tensor:
    """Pairs whose cosine is noise: ||g_w|| <= min_norm or ||g_s|| <= min_norm.

    The derivative of the cosine grows like 1/||g||, and confident samples, which semi-supervised methods select, have
    gradients that vanish: this is a normal case and not a corner.

    Args:
        products: inner products, [B] each.
        min_norm: bound on each norm, in the loss's own units.

    Returns:
        Boolean tensor [B].
    """
    return (products.weak.detach().sqrt() <= min_norm) | (products.strong.detach().sqrt() <= min_norm)


def cosine(products: GradProducts, degenerate: Tensor) -> Tensor:
    """GC = ⟨g_w, g_s⟩ / (||g_w|| ||g_s||), and 0 with a zero derivative for degenerate pairs.

    Each norm is divided by on its own: their product overflows and underflows where the norms do not, and so does the
    derivative of `rsqrt`, weak^(-3/2). The value is clamped to [-1, 1], which rounding can leave by a few units in the
    last place; the derivative is not clamped, so a pair at the edge still pulls.

    Args:
        products: inner products, [B] each.
        degenerate: pairs to leave out, [B].

    Returns:
        Cosines [B], differentiable in the products.
    """
    # Double `where`: a value masked after a division by zero still sends NaN backwards.
    one = torch.ones_like(products.weak)
    weak = torch.where(degenerate, one, products.weak)
    strong = torch.where(degenerate, one, products.strong)
    cross = torch.where(degenerate, torch.zeros_like(products.cross), products.cross)
    value = cross / weak.sqrt() / strong.sqrt()
    return value + (value.clamp(-1.0, 1.0) - value).detach()


class Criterion(Protocol):
    """What a pair adds to the loss, as a function of its inner products."""

    def terms(self, products: GradProducts, similarity: Tensor, degenerate: Tensor) -> Tensor:
        """Terms [B], before their weights.

        Args:
            products: inner products, [B] each.
            similarity: their cosines, 0 for degenerate pairs, [B].
            degenerate: pairs without a cosine, [B].

        Returns:
            Terms [B], differentiable in the products.
        """
        ...

    def steepness(self, norm_weak: Tensor, norm_strong: Tensor) -> Tensor:
        """About how large the derivative of a term for its two gradients is, [B]: what float16 must be able to hold."""
        ...


class Disagreement:
    """1 - GC; 0 for degenerate pairs, whose cosine is noise."""

    def terms(self, products: GradProducts, similarity: Tensor, degenerate: Tensor) -> Tensor:
        """See `Criterion.terms`."""
        del products
        return (1.0 - similarity).masked_fill(degenerate, 0.0)

    def steepness(self, norm_weak: Tensor, norm_strong: Tensor) -> Tensor:
        """1 / ||g||, of the smaller one."""
        return 1.0 / torch.minimum(norm_weak, norm_strong)


class SquaredNorms:
    """(||g_w||^2 + ||g_s||^2) / 2, which is smooth at 0: no pair is left out."""

    def terms(self, products: GradProducts, similarity: Tensor, degenerate: Tensor) -> Tensor:
        """See `Criterion.terms`."""
        del similarity, degenerate
        return 0.5 * products.weak + 0.5 * products.strong  # not their sum first, which overflows earlier

    def steepness(self, norm_weak: Tensor, norm_strong: Tensor) -> Tensor:
        """||g||, of the larger one."""
        return torch.maximum(norm_weak, norm_strong)
