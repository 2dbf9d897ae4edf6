"""Budgets: kernels that a layer adds to a call, and host reads of a call, by line of the library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss
from support.host_work import HostWork, by_line

# Kernels that one layer of a kind adds to the term and its backward, all pairs in one chunk. Lower them with the code.
BUDGET = {"convolution": 50, "convolution, strided": 50, "linear": 30, "group norm": 75}
READS = 4


def _layer(kind: str) -> nn.Module:
    convolution = nn.Conv2d(4, 4, 3, 2 if "strided" in kind else 1, 1, bias=False)
    made = {
        "linear": nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        "group norm": nn.Sequential(convolution, nn.GroupNorm(2, 4), nn.ReLU()),
    }
    return made.get(kind) or nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU())


def _work(kind: str, depth: int, **options: object) -> HostWork:
    torch.manual_seed(0)
    head = [] if kind == "linear" else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*(_layer(kind) for _ in range(depth)), *head, nn.LazyLinear(3))
    shape = (6, 8) if kind == "linear" else (6, 4, 8, 8)
    weak, target = torch.randn(shape), torch.randint(3, (6,))
    model(weak)
    loss = GradientConsistencyLoss(model, engine="ghost", chunk_size=None, **options)  # type: ignore[arg-type]

    def step() -> None:
        loss(weak, weak + torch.randn(shape), target).backward()

    step()  # also tries the model
    with HostWork() as work:
        step()
    return work


@pytest.mark.parametrize("kind", BUDGET)
def test_a_layer_adds_few_kernels(kind: str) -> None:
    few, many = (by_line(_work(kind, depth).kernels) for depth in (1, 2))
    added = {line: many.get(line, 0) - few.get(line, 0) for line in {**few, **many}}
    largest = sorted(added.items(), key=lambda item: -item[1])[:8]
    assert 0.9 * BUDGET[kind] < sum(added.values()) <= BUDGET[kind], f"most of them from {largest}"


@pytest.mark.parametrize("kind", BUDGET)
@pytest.mark.parametrize("depth", [1, 3])
def test_reads_do_not_grow_with_depth(kind: str, depth: int) -> None:
    reads = by_line(_work(kind, depth).reads)
    random_state = sum(count for line, count in reads.items() if "randomness.py" in line)  # lies on the host anyway
    assert sum(reads.values()) - random_state <= READS, reads


def test_the_counts_are_those_of_the_operators() -> None:
    x = torch.randn(3, requires_grad=True)
    with HostWork() as work:
        y = (x * x).view(3, 1).sum()
        y.backward()
        assert bool(y > 0)
        x.detach()[torch.tensor([True, False, True])].mul_(2.0)
    names = [name for (_, name), count in work.kernels.items() for _ in range(count)]
    assert sorted(names) == ["add", "gt", "index", "mul", "mul", "mul", "mul_", "ones_like", "sum"]
    assert sorted(name for _, name in work.reads) == ["_local_scalar_dense", "index"]


def test_operations_of_convolutions_count_groups() -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(6, 2, 3, 3, requires_grad=True)
    with HostWork() as work:
        y = torch.nn.functional.conv2d(x, w, stride=2, groups=2)
    assert work.operations == 2 * y.numel() * 2 * 9
    with HostWork() as work:
        y.sum().backward()
    assert work.operations == 2 * y.numel() * 2 * 9


class _Counting(nn.Module):
    """Scales by BatchNorm's own counter, read before, after and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        counter = self.norm.num_batches_tracked
        assert isinstance(counter, Tensor)
        before = counter.clone()
        x = self.norm(x)
        if float(torch.stack([counter])[0]) != float(before) + 1:
            raise ValueError("the counter did not count")
        return self.head(x)


def test_a_counter_of_batches_that_is_read_has_counted() -> None:
    model = _Counting()
    weak = torch.randn(5, 4)
    GradientConsistencyLoss(model, engine="loop")(weak, weak + 1.0, torch.zeros(5, dtype=torch.long)).backward()
    assert int(model.norm.num_batches_tracked) == 0  # type: ignore[arg-type]
