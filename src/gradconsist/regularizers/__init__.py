"""Regularisers to hold gradient consistency against, or to use beside it: terms to add to any loss.

`GradientNormPenalty` makes the per-sample gradients small instead of parallel, on the same pairs and engines.
`JacobianPenalty` makes the output change little with the input.

    >>> import torch
    >>> from gradconsist.regularizers import GradientNormPenalty, JacobianPenalty
    >>> _ = torch.manual_seed(0)
    >>> model, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
    >>> loss = 0.1 * GradientNormPenalty(model)(x, x, model(x).argmax(1)) + 0.1 * JacobianPenalty(model)(x)
    >>> loss.backward()
"""

from gradconsist.regularizers.gradient_norm import GradientNormPenalty
from gradconsist.regularizers.jacobian import JacobianPenalty

__all__ = ["GradientNormPenalty", "JacobianPenalty"]
