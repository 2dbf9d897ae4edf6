"""Semi-supervised methods: one file each, all called with an `SSLBatch` and returning a `StepOutput`.

A method is a module around the model. It computes its own loss and hands on the pair of views that gradient consistency
may compare, with the pseudo-labels and the mask that it used itself.

    >>> import torch
    >>> from gradconsist import SSLBatch
    >>> from gradconsist.methods import FixMatch
    >>> method = FixMatch(torch.nn.Linear(4, 3), threshold=0.5)
    >>> u = torch.randn(6, 4)
    >>> out = method(SSLBatch(torch.randn(2, 4), torch.tensor([0, 2]), u, u))
    >>> out.loss.dim(), out.pair.weight.shape
    (0, torch.Size([6]))
"""

from gradconsist.methods.fixmatch import FixMatch

__all__ = ["FixMatch"]
