"""`GradientNormPenalty`: makes per-sample gradients small instead of parallel."""

from __future__ import annotations

from typing import ClassVar

from gradconsist._consistency.similarity import Criterion, SquaredNorms
from gradconsist.loss import GradientConsistencyLoss


class GradientNormPenalty(GradientConsistencyLoss):
    """Penalises the squared norms of the per-sample gradients of both views.

        L_n = 1/B * sum over pairs u of weight(u) * (||g_w||^2 + ||g_s||^2) / 2

    Gradients, pairs and all options are the same as in `GradientConsistencyLoss`; so are the parameters that the result
    is differentiated for. `measure`, `last` and `GGCRWrapper` work the same way. Only the value per pair differs:

    - The squared norm is smooth at zero, so a degenerate pair (a norm of at most `min_norm`) keeps its weight. The
      record still counts it, because it has no cosine.
    - The penalty has the unit of a squared gradient. So you must tune its weight in a loss for every model, unlike the
      weight of 1 - GC.
    - ``stop_gradient`` makes one view's norm a constant, so only the other view is penalised.

    For one data set, averaged over samples, this is the trace of the gradients' uncentered covariance (of the empirical
    Fisher information, if targets are labels).

    Source: the paper's ablation "gradient norm penalty instead". The paper names it but gives no formula; using the
    squared norm of both views is this library's decision. It replaces eq. (2), with the same weight(u) and B.

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
