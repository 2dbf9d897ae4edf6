"""Two threads that compare at the same time, round after round, each held bitwise against what it gets alone.

    python tests/slow/concurrency.py            # 500 rounds of the default, 50 of each engine; results/concurrency.json
    python tests/slow/concurrency.py --quick    # 10 rounds, nothing written

Exit status 1 where a value differs, an error is raised, or the model is not as it was.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/shared"))
from environment import write_result

from gradconsist import GradientConsistencyLoss

RESULT = ROOT / "benchmarks" / "results" / "concurrency.json"
ROUNDS = {"auto": 500, "loop": 50, "vmap": 50, "ghost": 50}


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def work(network: nn.Module, engine: str) -> Callable[[], Tensor]:
    """Loss and gradient of one comparison, as one vector."""
    gc, parameters = GradientConsistencyLoss(network, engine=engine, chunk_size=4), list(network.parameters())
    generator = torch.Generator().manual_seed(1)
    weak, noise = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.arange(4) % 3

    def value() -> Tensor:
        loss = gc(weak, weak + noise, target)
        return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in torch.autograd.grad(loss, parameters))])

    return value


def snapshot(network: nn.Module) -> tuple[list[list[float]], list[bool]]:
    """Parameters, buffers and modes."""
    values = [tensor.flatten().tolist() for tensor in network.state_dict().values()]
    return values, [module.training for module in network.modules()]


def trial(engine: str, rounds: int, *, shared: bool) -> dict[str, Any]:
    """Two threads on one model, or on one each."""
    first = model(0)
    networks = [first, first if shared else model(1)]
    works = [work(network, engine) for network in networks]
    alone = [one() for one in works]
    before = snapshot(first)
    differing, errors = [0, 0], list[str]()

    def run(index: int) -> None:
        try:
            for _ in range(rounds):
                differing[index] += not torch.equal(works[index](), alone[index])
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    start = perf_counter()
    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "engine": engine,
        "threads_on": "one model" if shared else "two models",
        "rounds": rounds,
        "comparisons": 2 * rounds,
        "differing": sum(differing),
        "errors": sorted(set(errors)),
        "model_intact": snapshot(first) == before,
        "seconds": round(perf_counter() - start, 1),
    }


def main() -> int:
    """Runs all trials and prints them."""
    parser = argparse.ArgumentParser(description="Two threads that compare at the same time.")
    parser.add_argument("--quick", action="store_true", help="10 rounds, nothing written")
    options = parser.parse_args()
    wanted = dict.fromkeys(ROUNDS, 10) if options.quick else ROUNDS
    rows = [trial(engine, rounds, shared=shared) for engine, rounds in wanted.items() for shared in (True, False)]
    for row in rows:
        print(row)
    if not options.quick:
        write_result(RESULT, {"rows": rows})
    return int(any(row["differing"] or row["errors"] or not row["model_intact"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
