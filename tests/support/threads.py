"""Comparisons in threads side by side, each held bitwise against what it gives alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss

from .nets import views


def delicate(seed: int) -> nn.Module:
    """With statistics and dropout, which another thread would disturb."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)]
        return nn.Sequential(*layers).double()


def work(model: nn.Module, **options: Any) -> Callable[[], Tensor]:
    """Loss and gradient of one comparison, as one vector."""
    gc, parameters = GradientConsistencyLoss(model, **options), list(model.parameters())

    def value() -> Tensor:
        loss = gc(*views())
        return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in torch.autograd.grad(loss, parameters))])

    return value


def in_threads(works: list[Callable[[], Tensor]], rounds: int) -> tuple[int, list[str]]:
    """Runs each job in its own thread; returns how many results differed from the job alone, and the errors."""
    expected = [one() for one in works]
    differing: list[bool] = []
    errors: list[str] = []
    start = threading.Barrier(len(works))

    def run(one: Callable[[], Tensor], value: Tensor) -> None:
        start.wait()
        try:
            differing.extend(not torch.equal(one(), value) for _ in range(rounds))
        except BaseException as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=pair) for pair in zip(works, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(differing), errors
