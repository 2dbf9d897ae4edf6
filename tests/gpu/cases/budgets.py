"""What a step may ask of the host and the device: kernels, and numbers that the host waits for.

A step of FixMatch with the term on two networks of one and of two blocks; the difference is what a block costs. One
table holds all budgets. A read too many is named with its file and line. A budget that has become too large fails as
well: lower it then.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist.methods import FixMatch
from support import models
from support.simulated_gpu import SimulatedGPU
from support.zoo import Mean


class Budget(NamedTuple):
    """Most kernels, and the reads, of a step: of a network with one block, and of each block more.

    A read is a number that the host waits for, or the one copy that tells for all layers whether accuracy was lost.
    """

    kernels: int
    kernels_block: int
    reads: int
    reads_block: int


#: (network, with the term) -> budget. Kernels with some room, since torch's own operators change; reads with none.
BUDGETS = {
    ("wide_resnet", False): Budget(65, 19, 0, 0),
    ("wide_resnet", True): Budget(540, 190, 6, 0),
    ("transformer", False): Budget(98, 62, 0, 0),
    ("transformer", True): Budget(720, 420, 7, 0),
}


def wide_resnet(blocks: int) -> nn.Module:
    body = [models.WideBlock(4, 4, 1) for _ in range(blocks)]
    stem = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*stem, *body, nn.BatchNorm2d(4), nn.ReLU(), Mean(), nn.Linear(4, 3))


def transformer(blocks: int) -> nn.Module:
    body = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(blocks)]
    forward = lambda m, x: m.head(m.body(m.patch(x).flatten(2).transpose(1, 2)).mean(1))  # noqa: E731
    return models.Layers(forward, patch=nn.Conv2d(3, 8, 3, stride=3), body=nn.Sequential(*body), head=nn.Linear(8, 3))


NETWORKS = {"wide_resnet": wide_resnet, "transformer": transformer}


def counted(gpu: SimulatedGPU, model: nn.Module, *, term: bool) -> tuple[int, Counter[str], Counter[str]]:
    """Kernels, reads and copies of the third step; the first tries the model."""
    model.cuda()
    weak = torch.randn(8, 3, 6, 6).cuda()
    batch = SSLBatch(torch.randn(4, 3, 6, 6).cuda(), (torch.arange(4) % 3).cuda(), weak, weak.roll(1, 3))
    method, gc = FixMatch(model, threshold=0.0), GradientConsistencyLoss(model)
    wrapper = GGCRWrapper(method, gc, weight=0.1 if term else 0.0, warmup_steps=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        gpu.reset()
        loss = wrapper(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sum(gpu.kernels.values()), gpu.reads.copy(), gpu.copies.copy()


@pytest.mark.parametrize(("network", "term"), BUDGETS, ids=lambda part: str(part))
def test_a_step_stays_within_its_budget(network: str, term: bool, gpu: SimulatedGPU | None) -> None:
    if gpu is None:
        pytest.skip("only the simulated device counts")
    budget = BUDGETS[network, term]
    (one, reads, copies), (two, more, _) = (counted(gpu, NETWORKS[network](n), term=term) for n in (1, 2))
    told = Counter({line: count for line, count in copies.items() if "ghost/gram.py" in line and count == 1})
    assert not copies - told, f"copies in a step whose batch is on the device: {dict(copies)}"
    lines = "".join(f"\n  {count} of {line}" for line, count in reads.most_common())
    assert sum(reads.values()) == budget.reads, f"the host waits {sum(reads.values())} times a step:{lines}"
    added = more - reads
    lines = "".join(f"\n  {count} of {line}" for line, count in added.most_common())
    assert sum(added.values()) == budget.reads_block, f"the host waits {sum(added.values())} times a block:{lines}"
    assert 0.9 * budget.kernels <= one <= budget.kernels, f"{one} kernels a step"
    assert 0.9 * budget.kernels_block <= two - one <= budget.kernels_block, f"{two - one} kernels a block"
