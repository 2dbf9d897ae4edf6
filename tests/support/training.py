"""A small semi-supervised problem, and loops that record every bit of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import state


class Batch(NamedTuple):
    """The fields of the library's SSLBatch, for methods that are not the library's."""

    x: Tensor
    y: Tensor
    weak: Tensor
    strong: Tensor


def network(*, dropout: float = 0.2, seed: int = 0) -> nn.Sequential:
    """BatchNorm and dropout, so that buffers and random state have something to say."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = [nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)]
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), *head)


def batches(steps: int, *, labeled: int = 4, unlabeled: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(17)
    draw = lambda n: torch.randn(n, 5, generator=generator)  # noqa: E731
    found = []
    for _ in range(steps):
        weak = draw(unlabeled)
        y = torch.randint(3, (labeled,), generator=generator)
        found.append(Batch(draw(labeled), y, weak, weak + 0.5 * draw(unlabeled)))
    return found


class Counter:
    """Counts the forwards of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.calls = 0
        self.handle = model.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: Any) -> None:
        self.calls += 1


def plain_fixmatch(model: nn.Module, batch: Batch, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, pseudo-labels and mask of FixMatch in a few lines, one joint forward."""
    logits = model(torch.cat([batch.x, batch.weak, batch.strong]))
    x, weak, strong = logits.split([len(batch.x), len(batch.weak), len(batch.strong)])
    confidence, label = torch.softmax(weak.detach(), 1).max(1)
    mask = (confidence >= threshold).to(logits.dtype)
    unsupervised = (mask * F.cross_entropy(strong, label, reduction="none")).mean()
    return F.cross_entropy(x, batch.y) + unsupervised, label, mask


def train(
    step: Callable[[Any], Tensor], model: nn.Module, data: list[Any], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """One optimizer step per batch; after each, every bit: loss, gradients, parameters, buffers, random state."""
    log = []
    for batch in data:
        optimizer.zero_grad(set_to_none=True)
        loss = step(batch)
        loss.backward()
        entry = {"loss": float(loss.detach()).hex()}
        entry["gradients"] = {n: state.digest(p.grad) for n, p in model.named_parameters()}
        optimizer.step()
        entry["state"] = {n: state.digest(v) for n, v in model.state_dict().items()}
        entry["random state"] = state.digest(torch.random.get_rng_state())
        log.append(entry)
    return log
