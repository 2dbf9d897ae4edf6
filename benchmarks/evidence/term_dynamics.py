"""What the term does to training: gradients of the three losses and of the pairs, at steps along real runs.

    python benchmarks/evidence/term_dynamics.py --budget photos --output benchmarks/results/term_dynamics.json

The runs are cells of examples/reproduce.py (same options, split, initial weights, order of images). At evenly spaced
steps a copy of the model is looked at with the batch that the run is about to take; the run itself is not changed.

    ratio      ||grad L_g|| / ||grad (L_s + mu L_u)||, over all parameters: lambda times it is the term's part in a step
    against_u  cosine of grad L_g and grad L_u: below 0, the term works against the pseudo-labels
    against_s  likewise for L_s
    cosine     GC, mean over the confident pairs; cosine_all over every pair
    weak, strong        mean norm of the pairs' gradients, confident pairs; weak_all, strong_all over every pair
    degenerate share of the confident pairs without a direction
    step_gain  by how much L_g of this batch falls in a step of length 0.01 against its gradient, BatchNorm's statistics
               of the call taken anew, over what the gradient promises: 1 where it tells the truth
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "examples")]
from environment import write_result
from harness import Row, heading, parse, show

from gradconsist import GGCRWrapper, GradientConsistencyLoss
from trainer.claims import CLAIMS
from trainer.datasets import Images, load_images
from trainer.grid import BUDGETS, VARIANTS, Cell, build_grid
from trainer.loader import StepDataset, StepImages, ToModel
from trainer.methods import build_method
from trainer.split import choose_labeled
from trainer.step import Trainer

COLUMNS = {
    "variant": "<26", "seed": "4d", "step": "6d", "mask": "6.3f", "cosine": "7.3f", "cosine_all": "10.3f",
    "weak": "8.3f", "strong": "8.3f", "ratio": "8.4f", "against_u": "9.3f", "against_s": "9.3f", "step_gain": "9.3f",
}  # fmt: skip
TINY_STEP = 1e-2
# Not the runs without pairs, those with another term, and those whose statistics only the method's forward gives.
LOOKED_AT = [
    name
    for name, options in VARIANTS.items()
    if options["method"] != "supervised"
    and options["ggcr_criterion"] == "cosine"
    and options.get("ggcr_batchnorm") != "observed"
]


def look(trainer: Trainer, images: StepImages) -> Row:
    """The gradients at one step.

    Args:
        trainer: Of the run; nothing of it is changed.
        images: That it is about to train on.

    Returns:
        The quantities above; NaN where no pair is confident.
    """
    batch = trainer.to_model.batch(images)
    method = copy.deepcopy(trainer.method)
    plain: Any = method.method if isinstance(method, GGCRWrapper) else method
    model: nn.Module = plain.model
    again = dataclasses.replace(trainer.config, ggcr_weight=1.0, ggcr_criterion="cosine")
    wrapped = build_method(model, again)
    assert isinstance(wrapped, GGCRWrapper)
    term = wrapped.consistency
    parameters = list(model.parameters())
    out = plain(batch)
    whole = torch.autograd.grad(out.loss, parameters)
    plain.unlabeled_weight = 0.0
    supervised = torch.autograd.grad(plain(batch).loss, parameters)
    unlabeled = [a - b for a, b in zip(whole, supervised, strict=True)]
    pair = out.pair
    gate = pair.weight if trainer.config.ggcr_gate == "method" else torch.ones_like(pair.weight)
    every = term.measure(pair.weak, pair.strong, pair.target).summary()
    before, gradient, confident = _term(term, parameters, pair, gate)
    found: Row = {
        "mask": float(pair.weight.mean()),
        "cosine_all": every["cosine_mean"],
        "weak_all": every["norm_weak_mean"],
        "strong_all": every["norm_strong_mean"],
        "cosine": confident["cosine_mean"],
        "weak": confident["norm_weak_mean"],
        "strong": confident["norm_strong_mean"],
        "degenerate": confident["degenerate"] / max(1.0, confident["compared"]),
        "norm_s": _norm(supervised), "norm_u": _norm(unlabeled), "norm_g": _norm(gradient),
        "ratio": _norm(gradient) / _norm(whole),
        "against_u": _cosine(gradient, unlabeled),
        "against_s": _cosine(gradient, supervised),
    }  # fmt: skip
    with torch.no_grad():
        for parameter, direction in zip(parameters, gradient, strict=True):
            parameter.sub_(TINY_STEP * direction / max(_norm(gradient), 1e-12))
    after, _, _ = _term(term, parameters, pair, gate)
    found["step_gain"] = (before - after) / (TINY_STEP * _norm(gradient)) if _norm(gradient) else float("nan")
    return found


def _term(
    term: GradientConsistencyLoss, parameters: list[nn.Parameter], pair: Any, gate: Tensor
) -> tuple[float, list[Tensor], dict[str, float]]:
    """L_g, its gradient, and its pairs in six numbers."""
    for parameter in parameters:
        parameter.grad = None
    value = term(pair.weak, pair.strong, pair.target, gate)
    value.backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    assert term.last is not None
    return float(value.detach()), gradient, term.last.summary()


def _norm(tensors: Any) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def _cosine(first: Any, second: Any) -> float:
    product = sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))
    scale = _norm(first) * _norm(second)
    return product / scale if scale else float("nan")


def follow(cell: Cell, images: Images, looks: int) -> list[Row]:
    """Train a cell, looking at it `looks` times.

    Args:
        cell: Of a grid.
        images: Its data.
        looks: Rows.

    Returns:
        One row a look.
    """
    config = cell.config
    to_model = ToModel(*images.channel_statistics, torch.device("cpu"), channels_last=config.channels_last)
    trainer = Trainer.fresh(config, len(images.classes), to_model, len(images.train_y), None)
    dataset = StepDataset(images, choose_labeled(images, config), config)
    rows = []
    for step in range(config.steps):
        batch = dataset[step]
        if (step + 1) % max(1, config.steps // looks) == 0:
            rows.append({"variant": cell.variant, "seed": config.seed, "step": step, **look(trainer, batch)})
            show(rows[-1:], COLUMNS)
        trainer.train_step(lambda batch=batch: batch)  # type: ignore[misc]
    return rows


def summary(rows: list[Row]) -> list[Row]:
    """Medians of each variant over seeds and looks, by quarter of the run."""
    last = max(row["step"] for row in rows) + 1
    found = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        for quarter in range(4):
            part = [row for row in rows if row["variant"] == variant and row["step"] * 4 // last == quarter]
            medians = {
                name: statistics.median(values) if (values := [r[name] for r in part if r[name] == r[name]]) else None
                for name in part[0]
                if name not in ("variant", "seed", "step")
            }
            found.append({"variant": variant, "quarter": quarter + 1, "looks": len(part), **medians})
    return found


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="the smallest budget: shows that it runs, no more")
    made.add_argument("--output", type=Path, help="write rows, setting and environment as JSON")
    made.add_argument("--threads", type=int, default=1, help="torch's threads")
    made.add_argument("--budget", choices=list(BUDGETS), default="demo", help="of examples/reproduce.py")
    made.add_argument("--variants", nargs="+", choices=LOOKED_AT, default=["fixmatch", "ggcr", "ggcr-10.0"])
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("--looks", type=int, default=40, help="per run")
    made.add_argument("trainer", nargs="*", metavar="-- OPTION", help="options of fixmatch_cifar.py for every run")
    options = parse(made, budget="smoke", looks=4)
    grid = build_grid(Path("unused"), options.budget, list(CLAIMS), options.seeds, options.trainer)
    cells = [cell for cell in grid.cells if cell.variant in options.variants and cell.column == grid.cells[0].column]
    images = load_images(cells[0].config)
    assert isinstance(images, Images)
    setting = {name: getattr(options, name) for name in ("budget", "variants", "seeds", "looks", "trainer", "quick")}
    rows: list[Row] = []
    heading(COLUMNS)
    for cell in cells:
        rows += follow(cell, images, options.looks)
        if options.output:
            shown = [{name: None if value != value else value for name, value in row.items()} for row in rows]
            write_result(
                options.output, {"setting": setting, "rows": shown, "summary": summary(rows)}
            )  # JSON has no NaN


if __name__ == "__main__":
    main()
