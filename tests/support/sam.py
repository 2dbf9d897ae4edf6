"""Sharpness-aware minimisation by algorithm 1 of its paper, in NumPy, for a small network; no code of the library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Arrays = list[np.ndarray[Any, Any]]


def data(seed: int = 0, count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 5, generator=generator, dtype=torch.float64),
        torch.randint(3, [count], generator=generator),
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def numpy_gradient(w: Arrays, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> Arrays:
    """Of mean cross-entropy of the network above, by hand."""
    hidden = np.tanh(x @ w[0].T + w[1])
    z = hidden @ w[2].T + w[3]
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    d = p / len(y)
    back = (d @ w[2]) * (1 - hidden**2)
    return [back.T @ x, back.sum(0), d.T @ hidden, d.sum(0)]


def numpy_sam(
    w: Arrays,
    batches: list[tuple[Tensor, Tensor]],
    rho: list[float],
    lr: list[float],
    *,
    adaptive: bool = False,
    momentum: float = 0.9,
) -> Arrays:
    """Algorithm 1 with SGD and momentum; `rho` and `lr` for each of the four arrays."""
    w, velocity = [a.copy() for a in w], [np.zeros_like(a) for a in w]
    for step, (inputs, labels) in enumerate(batches):
        x, y = inputs.numpy(), labels.numpy()
        g = numpy_gradient(w, x, y)
        t = [np.abs(a) if adaptive else np.ones_like(a) for a in w]
        norm = np.sqrt(sum(((s * a) ** 2).sum() for s, a in zip(t, g, strict=True)))
        moved = [a + r * s**2 * b / norm for a, r, s, b in zip(w, rho, t, g, strict=True)]
        g = numpy_gradient(moved, x, y)
        velocity = [b if step == 0 else momentum * v + b for v, b in zip(velocity, g, strict=True)]
        w = [a - rate * v for a, rate, v in zip(w, lr, velocity, strict=True)]
    return w


def arrays(model: nn.Module) -> Arrays:
    return [p.detach().numpy().copy() for p in model.parameters()]
