"""Sharpness-aware minimisation (SAM) with any torch optimizer: finds flat minima by moving weights, not inputs.

>>> import torch
>>> from gradconsist.optim import SAM
>>> _ = torch.manual_seed(0)
>>> model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, [8])
>>> sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
>>> def closure():
...     sam.zero_grad()
...     loss = torch.nn.functional.cross_entropy(model(x), y)
...     loss.backward()
...     return loss
>>> before = sam.step(closure).item()
>>> closure().item() < before
True
"""

from gradconsist.optim.sam import SAM, kept_running_statistics

__all__ = ["SAM", "kept_running_statistics"]
