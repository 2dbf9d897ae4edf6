"""Statistics of a method are those of all processes: two of them equal one on the joined batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gradconsist.methods.processes import gather, last_rows
from support import ddp_workers
from support import methods as m
from support.processes import Processes


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with Processes(2) as ranks:
        yield ranks


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm().clamp_min(1e-300))


@pytest.mark.parametrize("name", sorted(m.SHARED))
def test_two_processes_train_as_one(two: Processes, name: str) -> None:
    """Five steps of SGD: averaged gradients, masks and the whole state."""
    alone = m.distributed_run(name, None, (4, 4), 5)
    ranks = two.run(ddp_workers.methods_state, name, (4, 4), 5)
    for step in range(5):
        joined = ranks[0]["masks"][step] + ranks[1]["masks"][step]
        assert joined == pytest.approx(alone["masks"][step], abs=1e-9)
        for rank in ranks:
            assert relative(rank["gradients"][step], alone["gradients"][step]) <= 1e-9
    for rank in ranks:
        for key, value in alone["state"].items():
            assert relative(rank["state"][key].double(), value.double()) <= 1e-9, key


@pytest.mark.parametrize("name", ["flexmatch", "freematch", "softmatch", "temporalensembling"])
def test_uneven_shares_have_one_state(two: Processes, name: str) -> None:
    """In the first step, before parameters differ: the state is that of the joined batch."""
    alone = m.distributed_run(name, None, (2, 5), 1)["state"]
    for rank in two.run(ddp_workers.methods_state, name, (2, 5), 1):
        for key, value in alone.items():
            if not key.startswith("model."):
                assert relative(rank["state"][key].double(), value.double()) <= 1e-12, key


def test_in_one_process_nothing_is_gathered() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert torch.equal(gather(rows), rows)
    assert not gather(rows).requires_grad


def test_the_last_of_repeated_entries() -> None:
    entries, rows = last_rows(torch.tensor([4, 1, 4, 0, 1, 4]))
    assert dict(zip(entries.tolist(), rows.tolist(), strict=True)) == {0: 3, 1: 4, 4: 5}
    assert len(last_rows(torch.tensor([], dtype=torch.int64))[0]) == 0
