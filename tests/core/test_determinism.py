"""C8 of the test plan: the same seed twice gives the same bits, step by step, with one thread and with two."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist.methods import FixMatch
from support import compare, training
from support.zoo import CASES

ENGINES = ["loop", "vmap", "ghost", "auto"]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(engine: str, steps: int, **options: Any) -> list[dict[str, Any]]:
    """FixMatch with the term: BatchNorm, dropout, random subsets; every bit of every step."""
    torch.manual_seed(11)
    method = FixMatch(training.network(dropout=0.2), threshold=0.37)
    gc = GradientConsistencyLoss(method.model, engine=engine, **options)
    wrapper = GGCRWrapper(method, gc, weight=0.5, warmup_steps=3, ramp_steps=5)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    data = [SSLBatch(*batch) for batch in training.batches(steps)]
    return training.train(lambda batch: wrapper(batch).loss, method.model, data, optimizer)


@pytest.mark.parametrize(
    ("engine", "steps", "count"),
    [("auto", 30, 1), ("auto", 8, 2), ("loop", 8, 1), ("vmap", 8, 1)],
)
def test_c8_the_same_seed_twice(engine: str, steps: int, count: int) -> None:
    """Up to 30 steps with ``max_pairs`` and dropout inside: losses, gradients, states and the random stream."""
    with threads(count):
        first, second = (run(engine, steps, max_pairs=2, dropout="on") for _ in range(2))
    assert first == second
    assert len({entry["loss"] for entry in first}) == steps  # it does train


@pytest.mark.parametrize("name", ["cnn_batchnorm_train", "vit", "tied_embedding", "gru"])
@pytest.mark.parametrize("engine", ENGINES)
def test_c8_two_calls_are_bitwise_equal(engine: str, name: str) -> None:
    """On the same loss, whose first call also probes the model, and on a new one."""
    if engine == "vmap" and CASES[name].vmap == "refused":
        engine = "auto"
    p = CASES[name].problem(dtype=torch.float32)
    gc = GradientConsistencyLoss(p.model, engine=engine)
    found = []
    for loss in (gc, gc, GradientConsistencyLoss(p.model, engine=engine)):
        value = loss(*p.views)
        found.append((value.detach(), loss.last.cosine, compare.gradient_of(value, p.model)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_c8_another_process_agrees() -> None:
    """No order of sets or addresses enters: another hash seed, other memory, the same bits."""
    program = (
        "import sys, json; sys.path[:0] = json.loads(sys.argv[1])\n"
        "import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('runs', sys.argv[2])\n"
        "runs = importlib.util.module_from_spec(spec); spec.loader.exec_module(runs)\n"
        "import torch; torch.set_num_threads(1)\n"
        "print(json.dumps(runs.run('auto', 5, max_pairs=3)))"
    )
    command = [sys.executable, "-c", program, json.dumps(sys.path), str(Path(__file__))]
    environment = {"PYTHONHASHSEED": str(hash("seed") % 1000), "OMP_NUM_THREADS": "1"}  # this process's is another
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    with threads(1):
        assert run("auto", 5, max_pairs=3) == json.loads(done.stdout)
