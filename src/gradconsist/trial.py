"""The term on one pair, before its turn comes: for mistakes that would otherwise show after a long warm-up."""

from __future__ import annotations

from dataclasses import replace

import torch

from gradconsist.batch import take
from gradconsist.comparison import compare
from gradconsist.errors import NonFiniteError
from gradconsist.isolation import one_comparison, uncompiled
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.normalization import Constants
from gradconsist.types import ViewPair


@uncompiled
def try_on_one_pair(consistency: GradientConsistencyLoss, pair: ViewPair, statistics: Constants | None = None) -> bool:
    """Evaluates a loss and its gradient on one pair, and leaves no trace but what it learns about the model.

    All views, targets and weights are checked. The pair is the first one of positive weight, or else the first one with
    weight 1: a method may be confident of none at the start. Record, generator and number of calls of the loss stay as
    they are, and so do the model, its gradients and the random state.

    Args:
        consistency: the loss.
        pair: the views of a step.
        statistics: constants of the BatchNorm calls, as for `GradientConsistencyLoss.evaluate`.

    Returns:
        Whether it was conclusive: numbers that are not finite say nothing about the model.

    Raises:
        GradConsistError: whatever the loss itself would raise for such a step.
    """
    with one_comparison():
        pairs = consistency._check(*pair, fused=consistency.settings.fused)
        positive = pairs.weight.detach().nonzero().flatten()
        index = positive[:1] if len(positive) else positive.new_zeros(1)
        weak, strong = take(pairs.weak, index), take(pairs.strong, index)
        weight = torch.ones_like(pairs.weight[index].detach())
        one = replace(pairs, weak=weak, strong=strong, target=pairs.target[index], weight=weight)
        # Of its own: the loss's draws next what it would have drawn.
        options = consistency._comparison(torch.Generator().manual_seed(0), statistics)
        try:
            compare(options, one)  # max_pairs is at least this one
        except NonFiniteError:
            return False
    return True
