"""`GradientNormPenalty`: small per-sample gradients instead of parallel ones."""

from __future__ import annotations

from typing import ClassVar

from gradconsist._consistency.similarity import Criterion, SquaredNorms
from gradconsist.loss import GradientConsistencyLoss


class GradientNormPenalty(GradientConsistencyLoss):
    """L_n = 1/B * sum over pairs u of weight(u) * (||g_w||^2 + ||g_s||^2) / 2.

    The gradients, the pairs and every option are those of `GradientConsistencyLoss`, and so is what the result is
    differentiated for; `measure`, `last` and `GGCRWrapper` work alike. What differs is what a pair adds:

    - The squared norm is smooth at zero, so a degenerate pair (a norm of at most `min_norm`) keeps its weight. It is
      still counted in the record, because it has no cosine.
    - The penalty has the unit of a squared gradient: its weight in a loss has to be chosen anew for every model, where
      that of 1 - GC need not.
    - ``stop_gradient`` makes one view's norm a constant, which leaves the penalty of the other.

    On its own data, averaged over samples, this is the trace of the gradients' uncentered covariance (the empirical
    Fisher information's, where targets are labels).

    Source: the paper's ablation, "gradient norm penalty instead", which names it and gives no formula; the squared norm
    of both views is this library's decision. It takes the place of eq. (2), at the same weight(u) and over the same B.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> x, target = torch.randn(8, 4), torch.randint(3, [8])
        >>> penalty = GradientNormPenalty(model)
        >>> loss = penalty(x, x, target)
        >>> residual = model(x).softmax(1) - torch.nn.functional.one_hot(target, 3)
        >>> by_hand = (residual.square().sum(1) * (x.square().sum(1) + 1)).mean()
        >>> torch.allclose(loss, by_hand)
        True
    """

    criterion: ClassVar[Criterion] = SquaredNorms()
