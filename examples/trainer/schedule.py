"""The optimizer, and the schedule of the FixMatch line of work: seven sixteenths of a cosine."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer


def cosine_factor(step: int, steps: int) -> float:
    """`cos(7 pi k / 16 K)`: 1 at the start, 0.195 at the end, never 0."""
    return math.cos(7 * math.pi * step / (16 * steps))


def set_learning_rate(optimizer: Optimizer, lr: float, step: int, steps: int, warmup: int = 0) -> float:
    """Set the learning rate of step k, a function of k alone.

    Args:
        optimizer: Whose rate to set.
        lr: The rate without factor.
        step: k, the step about to be taken, from 0.
        steps: The length of the run.
        warmup: W; the factor is `(k + 1) / W` in the first W steps, and the cosine of the steps after them.
    """
    value = lr * ((step + 1) / warmup if step < warmup else cosine_factor(step - warmup, steps - warmup))
    for group in optimizer.param_groups:
        group["lr"] = value
    return value


def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float, adamw: bool = False) -> Optimizer:
    """SGD with Nesterov momentum 0.9, or AdamW, with weight decay on kernels only.

    A kernel is a parameter of two or more dimensions: names would miss the BatchNorm of a shortcut.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kernels = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=lr) if adamw else SGD(groups, lr=lr, momentum=0.9, nesterov=True)
