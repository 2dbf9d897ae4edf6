"""SAM under DDP on two gloo processes: synchronised, and with the first pass under no_sync."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from support import sam_workers
from support.processes import Processes
from support.sam import Arrays, arrays, data, network, numpy_gradient


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with Processes(2) as ranks:
        yield ranks


def expected(start: Arrays, *, own_perturbation: bool) -> Arrays:
    """Three steps on both ranks' batches, rho = 0.3, lr = 0.2, in NumPy."""
    w = [a.copy() for a in start]
    for step in range(3):
        batches = [tuple(t.numpy() for t in data(10 * step + rank)) for rank in range(2)]
        own = [numpy_gradient(w, *batch) for batch in batches]
        mean = [(a + b) / 2 for a, b in zip(*own, strict=True)]
        second = []
        for batch, g in zip(batches, own if own_perturbation else [mean, mean], strict=True):
            norm = np.sqrt(sum((part**2).sum() for part in g))
            second.append(numpy_gradient([a + 0.3 * part / norm for a, part in zip(w, g, strict=True)], *batch))
        w = [a - 0.2 * (g + h) / 2 for a, g, h in zip(w, *second, strict=True)]
    return w


@pytest.mark.parametrize("no_sync", [False, True])
def test_two_processes(two: Processes, no_sync: bool) -> None:
    model = network()
    batches = [[data(10 * step + rank) for step in range(3)] for rank in range(2)]
    first, second = two.run(sam_workers.train, model, batches, no_sync)
    for found, other, wanted in zip(first, second, expected(arrays(model), own_perturbation=no_sync), strict=True):
        assert torch.equal(found, other)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10, atol=1e-13)
