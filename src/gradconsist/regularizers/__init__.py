"""Regularisers to compare or combine with gradient consistency; add them to any loss.

`GradientNormPenalty` makes per-sample gradients small instead of parallel, with the same pairs and engines.
`JacobianPenalty` keeps the output from changing much with the input.

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
