"""The nine algorithms of semilearn 0.3.2 on scikit-learn's digits, with the term attached and without.

    python tests/slow/usb.py --output benchmarks/results/usb.json --clock cpu --threads 1    # minutes
    python tests/slow/usb.py --quick

One row an algorithm, on semilearn's own WRN-28-2 and loaders, its hooks (optimizer, EMA) included:

    bitwise     over --steps steps, loss and final parameters of a run with weight 0 equal those without the term
    moved       share of the parameters' tensors that differ after --steps steps with the term
    ratio       a step with the term, every pair compared, over a step without it, in alternation
    cosine      mean over the compared pairs of the last step

Thresholds are 0, so that every pair counts; with a confidence threshold the term costs less. Where there is no GPU,
semilearn's `.cuda()` is replaced (tests/support/usb.py), and nothing else.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks/shared", "examples", "tests")]
from environment import write_result
from harness import alternate, heading, parse, parser, setting, show

from gradconsist import GradientConsistencyLoss
from gradconsist.adapters.usb import attach
from support import usb
from usb_fixmatch import digits

COLUMNS = {
    "algorithm": "<12", "bitwise": "7", "moved": "6.2f", "pairs": "6.0f", "cosine": "7.3f",
    "seconds_median": "8.3f", "ratio_median": "7.2f", "ratio_min": "7.2f", "ratio_max": "7.2f",
}  # fmt: skip


def wide_network(num_classes: int, **_: Any) -> torch.nn.Module:
    """Semilearn's WRN-28-2."""
    from semilearn.nets import wrn_28_2

    network: torch.nn.Module = wrn_28_2(num_classes=num_classes)
    return network


def build(name: str, options: Any, **term: Any) -> Any:
    """An algorithm, with the term if `term` has its options."""
    network = usb.small_network if options.quick else wide_network
    sizes = {"batch_size": options.labeled, "uratio": options.ratio, "num_train_iter": 1000, "ulb_dest_len": 1497}
    algorithm = usb.build(name, network=network, p_cutoff=0.0, **sizes)
    if term:
        encoder = lambda parameter: not parameter.startswith("classifier.")  # noqa: E731
        attach(algorithm, GradientConsistencyLoss(algorithm.model, encoder=encoder), **term)
    algorithm.it = 400  # past the ramps of MeanTeacher, PiModel, MixMatch and PseudoLabel
    return algorithm


def batches(name: str, options: Any) -> list[dict[str, Any]]:
    """Batches of semilearn's loaders."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    config = SimpleNamespace(
        algorithm=name, batch_size=options.labeled, uratio=options.ratio, epoch=1, num_train_iter=options.steps,
        net="wrn_28_2",
    )  # fmt: skip
    loaders = digits(config)
    pairs = zip(loaders["train_lb"], loaders["train_ulb"], strict=True)
    return [{**labeled, **unlabeled} for labeled, unlabeled in pairs]


def train(algorithm: Any, data: list[dict[str, Any]]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Losses of all steps, and the last step's logs."""
    losses, logs = [], {}
    for step, batch in enumerate(data):
        torch.manual_seed(step)
        numpy.random.seed(step)
        out, logs = usb.step(algorithm, batch)
        losses.append(out["loss"].detach())
    return losses, logs


def row(name: str, options: Any) -> dict[str, Any]:
    """What the table says of one algorithm."""
    data = batches(name, options)
    plain, zero, term = (
        build(name, options),
        build(name, options, weight=0.0),
        build(name, options, weight=0.1, warmup_steps=0),
    )
    start = [parameter.detach().clone() for parameter in term.model.parameters()]
    losses, _ = train(plain, data)
    same, _ = train(zero, data)
    _, logs = train(term, data)
    ends = zip(plain.model.parameters(), zero.model.parameters(), strict=True)
    bitwise = all(torch.equal(a, b) for a, b in [*zip(losses, same, strict=True), *ends])
    moved = [not torch.equal(new, old) for new, old in zip(term.model.parameters(), start, strict=True)]
    steps = {"without": lambda: usb.step(plain, data[0]), "with": lambda: usb.step(term, data[0])}
    timing = alternate(steps, options.rounds, clock=options.clock)
    return {
        "algorithm": type(plain).__name__,
        "bitwise": bitwise,
        "moved": sum(moved) / len(moved),
        "unmoved": [n for (n, _), m in zip(term.model.named_parameters(), moved, strict=True) if not m],
        "pairs": logs["train/ggcr_pairs"],
        "cosine": logs["train/ggcr_cosine"],
        **timing.row("with", "without"),
    }


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--labeled", type=int, default=8)
    made.add_argument("--ratio", type=int, default=7, help="unlabeled images for each labeled one")
    made.add_argument("--steps", type=int, default=5, help="of the runs that are compared")
    made.add_argument("--rounds", type=int, default=5, help="of the timing")
    options = parse(made, ratio=2, steps=2, rounds=2)
    usb.semilearn()
    heading(COLUMNS)
    rows = []
    for name in usb.ALGORITHMS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(row(name, options))
        show(rows[-1:], COLUMNS)
    if options.output:
        network = "semilearn's WRN-28-2" if not options.quick else "semilearn's WRN, depth 10"
        chosen = setting(options, "labeled", "ratio", "steps", "rounds") | {"data": "digits 8x8", "network": network}
        write_result(options.output, {"setting": chosen, "rows": rows})
    return int(not all(each["bitwise"] for each in rows))


if __name__ == "__main__":
    sys.exit(main())
