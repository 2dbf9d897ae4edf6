"""What one rank does in the tests of SAM under DDP."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradconsist.optim import SAM


def train(
    rank: int, world: int, model: nn.Module, batches: list[list[tuple[Tensor, Tensor]]], no_sync: bool
) -> list[Tensor]:
    """The weights after one step a batch of this rank."""
    ddp = DistributedDataParallel(model)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.2), rho=0.3)
    for x, y in batches[rank]:
        with ddp.no_sync() if no_sync else nullcontext():
            F.cross_entropy(ddp(x), y).backward()
        sam.first_step()
        F.cross_entropy(ddp(x), y).backward()
        sam.second_step()
        sam.zero_grad()
    return [p.detach().clone() for p in model.parameters()]
