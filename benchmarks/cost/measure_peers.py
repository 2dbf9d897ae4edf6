"""Monitoring: the cosine of the two views' gradients for every pair, without a graph, by this library and by others.

    python benchmarks/cost/measure_peers.py --output benchmarks/results/measure_peers.json

`gc.measure` with its engines stands beside Opacus (per-sample gradients by hooks), BackPACK (BatchGrad), TorchJD (the
Gramian of all 2 n losses: it computes 4 n^2 products where n are wanted, so its time per pair grows with n; two sizes
show it) and vmap(grad) written out by hand as torch's tutorial has it. All parameters are compared. No model has
BatchNorm, whose per-sample gradient the others do not define; vit-tiny-table keeps its positions in an nn.Embedding,
as hooks need it.

Rounds alternate with a rotating order; "ratio" is the time over that of the default engine in the same round. Errors
are those of cosines against the tests' float64 loop on a few of the same pairs (there is no gradient to be wrong). What
a library refuses is a row with its reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "tests")]
import peers
from environment import write_result
from harness import Reference, Row, alternate, attempted, heading, parse, parser, setting, show
from models import spec
from steps import make_batch

from gradconsist import GradientConsistencyLoss
from support.compare import cosine_error

MODELS = ("mlp", "cnn", "wrn-10-1-gn", "vit-tiny-table")
OURS: dict[str, dict[str, object]] = {
    "gradconsist, default": {},
    "gradconsist, ghost, all pairs": {"engine": "ghost", "chunk_size": None},
    "gradconsist, vmap": {"engine": "vmap"},
    "gradconsist, loop": {"engine": "loop"},
}
THEIRS: dict[str, Callable[[nn.Module], peers.Monitor]] = {
    "vmap(grad) by hand": peers.by_hand,
    "Opacus, GradSampleModule": peers.opacus,
    "BackPACK, BatchGrad": peers.backpack,
    "TorchJD, Gramian of all pairs": peers.torchjd,
}
BASE = "gradconsist, default"
COLUMNS = {
    "pairs": "5d", "variant": "<30", "seconds_median": "9.4f", "ratio_median": "7.2f", "ratio_min": "9.2f",
    "ratio_max": "9.2f", "milliseconds_a_pair": "19.3f", "cosine_error": "12.1e",
}  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=list(MODELS), help="see benchmarks/cost/models.py")
    made.add_argument("--pairs", nargs="+", type=int, default=[8, 32])
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--oracle-pairs", type=int, default=3, help="pairs that the float64 loop checks")
    options = parse(made, pairs=[4], rounds=2, oracle_pairs=1)
    rows: list[Row] = []
    for model_name in options.models:
        print(f"\n{model_name}")
        heading(COLUMNS)
        for pairs in options.pairs:
            torch.manual_seed(0)
            model = spec(model_name).build().to(options.device)
            batch: Any = make_batch(model_name, 1, pairs, device=options.device)
            with torch.no_grad():
                target = model(batch.weak).argmax(1)
            views = batch.weak, batch.strong, target
            reference = Reference(model, *views, min(options.oracle_pairs, pairs))
            monitors = {**{name: _ours(model, given) for name, given in OURS.items()}, **_theirs(model)}
            timing = alternate(
                {name: _call(monitor, views) for name, monitor in monitors.items()},
                options.rounds, clock=options.clock, device=options.device,
            )  # fmt: skip
            for name, monitor in monitors.items():
                row = {"model": model_name, "pairs": pairs, **timing.row(name, BASE)}
                if name not in timing.failed:
                    row["milliseconds_a_pair"] = 1e3 * row["seconds_median"] / pairs
                    count = reference.count
                    row["cosine_error"] = cosine_error(monitor(*views)[:count].cpu(), reference.verdict().cosine)
                rows.append(row)
                show([row], COLUMNS)
        if options.output:  # so that a run that is stopped keeps what it has
            used = setting(options, "pairs", "rounds", "oracle_pairs")
            write_result(options.output, {"setting": used, "rows": rows})


def _ours(model: nn.Module, options: dict[str, object]) -> peers.Monitor:
    gc = GradientConsistencyLoss(model, **options)  # type: ignore[arg-type]
    return lambda weak, strong, target: gc.measure(weak, strong, target).cosine


def _theirs(model: nn.Module) -> dict[str, peers.Monitor]:
    """Each library's monitor; one that cannot be set up raises its reason when it is called."""
    made: dict[str, peers.Monitor] = {}
    for name, build in THEIRS.items():
        monitor, why = attempted(lambda build=build: build(model))  # type: ignore[misc]
        made[name] = monitor or _refusing(why)
    return made


def _refusing(why: str) -> peers.Monitor:
    def monitor(weak: Tensor, strong: Tensor, target: Tensor) -> Tensor:
        raise peers.RefusedError(why)

    return monitor


def _call(monitor: peers.Monitor, views: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    return lambda: monitor(*views)


if __name__ == "__main__":
    main()
