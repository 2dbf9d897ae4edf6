"""Gradient-Guided Consistency Regularization for any PyTorch training loop.

For each unlabeled input, the per-sample gradients of the loss on a weakly and on a strongly augmented view should
point in the same direction. `GradientConsistencyLoss` adds this as a loss term to your own training loop;
`GGCRWrapper` adds it to any semi-supervised method.

    >>> import torch
    >>> from gradconsist import GradientConsistencyLoss
    >>> model = torch.nn.Linear(4, 3)
    >>> gc = GradientConsistencyLoss(model)
    >>> weak = torch.randn(8, 4)
    >>> loss = gc(weak, weak, torch.randint(3, [8]))  # identical views agree
    >>> f"{abs(loss.item()):.3f}"
    '0.000'
"""

from gradconsist.engines.projection import RandomProjection
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.types import ConsistencyRecord, SSLBatch, StepOutput, ViewPair
from gradconsist.wrapper import GGCRWrapper

__version__ = "0.2.0"

__all__ = [
    "ConsistencyRecord",
    "GGCRWrapper",
    "GradientConsistencyLoss",
    "RandomProjection",
    "SSLBatch",
    "StepOutput",
    "ViewPair",
    "__version__",
]
