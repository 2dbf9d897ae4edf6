"""What can be given up for less time or memory, and what it does to the gradient of L_g.

    python benchmarks/cost/frontier.py --threads 1 --clock cpu --output benchmarks/results/frontier.json

For the exact term and each setting that spends less: the step with it over the split FixMatch step, its peak memory
likewise (one process per point, point.py), how far its cosines are off, and the angle between its gradient and
the exact one. Every batch is one round: all settings take one step on it, in an order that rotates, and each step's
time, cosines and gradient are kept (the gradient of the term is that of the step less that of the plain one). The first
round warms up, so its times do not count, and its gradients do. Angles are of one step, and of the mean over all
rounds; a wrapper with `every=k` is derived from the steps without: it takes one round in k, and its time is that of one
step in k. Settings with `observed` statistics are held against the exact term of those.

Noise is sqrt(mean |e|^2 / mean |g|^2) for the exact gradient g of a batch and e, by how far a setting's is off. One
step in k, times k, makes sqrt(k n^2 + k - 1) of a noise n: e is then -g in k - 1 steps, and (k - 1) g + k e in one.
What training lives with anyway is the last row: how far the exact gradient of a batch is off that of all batches.

The second part is about the Kronecker kind alone: the gradients of a few samples, one by one, projected by many draws
at several ranks. Their squared norm is off by chance, with a variance that the docstring of `RandomProjection` bounds;
the bound is computed from the same gradients.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/shared"))
from environment import write_result
from harness import Row, flat_gradient, heading, parse, parser, setting, show, timed
from memory import with_ratios
from models import spec
from point import measure, memory_limit
from steps import FRONTIER, PLAIN, WEIGHT, Step, applies, make_batch

from gradconsist import GradientConsistencyLoss, RandomProjection
from gradconsist._inputs.batch import take
from gradconsist.engines import GradProducts, Problem

EXACT = "exact"
BATCHES = "exact, of another batch"
QUICK = (EXACT, "max_pairs, 1/7 of all", "kronecker, k=4", "kronecker, k=16")
EVERY = (2, 4)
THINNED = (EXACT, "max_pairs, 1/7 of all", "observed", "observed, max_pairs, 1/7 of all")
COLUMNS = {
    "variant": "<40", "ratio_median": "7.2f", "peak_ratio": "10.2f", "cosine_error": "12.4f", "cosine_bias": "12.4f",
    "angle_mean": "10.1f", "angle_deviation": "15.1f", "angle_of_mean": "13.1f", "norm_ratio": "10.2f",
    "noise": "7.2f",
}  # fmt: skip
RANK_COLUMNS = {
    "dim": "4d", "norm_error": "10.4f", "norm_bound": "10.4f", "cosine_error": "12.4f", "cosine_bias": "12.4f",
}  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=["wrn-28-2", "vit-tiny"], help="see benchmarks/cost/models.py")
    made.add_argument("--labeled", type=int, default=8)
    made.add_argument("--pairs", type=int, default=56)
    made.add_argument("--rounds", type=int, default=4, help="batches; the first one warms up")
    made.add_argument("--only", nargs="*", choices=FRONTIER, default=list(FRONTIER), help="beside the exact term")
    made.add_argument("--no-memory", action="store_true", help="leave the processes for the peaks out")
    made.add_argument("--ranks", action="store_true", help="the second part only; the settings' rows are kept")
    made.add_argument("--samples", type=int, default=4, help="pairs whose gradients are projected at every rank")
    made.add_argument("--draws", type=int, default=30, help="of the matrices, at every rank")
    options = parse(made, labeled=2, pairs=14, rounds=2, samples=1, draws=5, only=list(QUICK))
    # Models of an earlier run are kept, so that each can have a run of its own.
    kept = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    rows = [row for row in kept.get("rows", []) if options.ranks or row["model"] not in options.models]
    ranks = [row for row in kept.get("ranks", []) if row["model"] not in options.models]
    used = setting(options, "labeled", "pairs", "rounds", "samples", "draws")
    for model_name in options.models:
        torch.manual_seed(0)
        model = spec(model_name).build().to(options.device)
        print(f"\n{model_name}: {options.labeled} labeled + {options.pairs} pairs", flush=True)
        ranks += rank_rows(model, model_name, options)
        heading(RANK_COLUMNS)
        show([row for row in ranks if row["model"] == model_name], RANK_COLUMNS)
        if options.ranks:
            write(options, used, rows, ranks)
            continue
        names = [EXACT, *(name for name in options.only if name != EXACT and applies(name, model))]
        mine = settings_rows(model, model_name, names, options)
        write(options, used, [*rows, *mine], ranks)
        if not options.no_memory:
            add_peaks(mine, model_name, options)
        rows += mine
        heading(COLUMNS)
        show(mine, COLUMNS)
        write(options, used, rows, ranks)


def write(options: Any, used: Row, rows: Sequence[Row], ranks: Sequence[Row]) -> None:
    """The result so far, so that a run that is stopped keeps what it has."""
    if options.output:
        write_result(options.output, {"setting": used, "rows": list(rows), "ranks": list(ranks)})


@dataclass
class Record:
    """What the rounds showed of one setting; gradients of the term are float32, as one vector."""

    seconds: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)


def settings_rows(model: Any, model_name: str, names: list[str], options: Any) -> list[Row]:
    """One row a setting."""
    steps: dict[str, Step] = {}
    records = {name: Record() for name in (PLAIN, *names)}
    for round_ in range(options.rounds):
        torch.manual_seed(1 + round_)
        batch = make_batch(model_name, options.labeled, options.pairs, device=options.device)
        steps = steps or {name: Step(name, model, batch) for name in records}
        shift = round_ % len(names)
        for name in (PLAIN, *names[shift:], *names[:shift]):
            step, record = steps[name], records[name]
            step.batch = batch
            record.seconds.append(timed(step, options.clock, options.device))
            # The gradient of the whole step, less the plain one's.
            gradient = flat_gradient(model)
            if name != PLAIN:
                gradient = (gradient - records[PLAIN].gradients[-1]) / WEIGHT
                record.cosines.append(step.term.last.cosine.clone())
            record.gradients.append(gradient)
        print(f"  round {round_ + 1} of {options.rounds}", flush=True)
        for name in names:
            records[name].gradients[-1] = records[name].gradients[-1].float()
    rows = [_row(model_name, name, records) for name in (PLAIN, *names)]
    by_name = {row["variant"]: row for row in rows}
    rows += [_every(by_name[name], k, records) for name in THINNED if name in names for k in EVERY]
    return [*rows, _batches(model_name, records[EXACT].gradients)]


def _exact(name: str, records: dict[str, Record]) -> Record:
    """What a setting is held against."""
    return records["observed" if name.startswith("observed") and "observed" in records else EXACT]


def _row(model_name: str, name: str, records: dict[str, Record]) -> Row:
    record, plain, exact = records[name], records[PLAIN], _exact(name, records)
    ratios = [mine / other for mine, other in zip(record.seconds[1:], plain.seconds[1:], strict=True)]
    row: Row = {"model": model_name, "variant": name, "reason": None}
    row |= {"seconds_median": statistics.median(record.seconds[1:]), "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios), "ratio_max": max(ratios)}  # fmt: skip
    if name == PLAIN:
        return row
    differences = torch.cat([a - b for a, b in zip(record.cosines, exact.cosines, strict=True)])
    differences = differences[~differences.isnan()]
    angles = [angle(a, b) for a, b in zip(record.gradients, exact.gradients, strict=True)]
    lengths = [float(a.norm() / b.norm()) for a, b in zip(record.gradients, exact.gradients, strict=True)]
    return row | {
        "cosine_error": float(differences.abs().mean()), "cosine_bias": float(differences.mean()),
        "angle_mean": statistics.mean(angles), "angle_deviation": statistics.pstdev(angles),
        "angle_of_mean": angle(_mean(record.gradients), _mean(exact.gradients)),
        "norm_ratio": statistics.mean(lengths), "noise": _noise(record.gradients, exact.gradients),
    }  # fmt: skip


def _every(row: Row, k: int, records: dict[str, Record]) -> Row:
    """One step in k, times k: for each of the k places to begin, its mean gradient against that of all steps."""
    mine, exact = records[row["variant"]].gradients, _exact(row["variant"], records).gradients
    rounds = len(exact) // k * k
    angles = [angle(_mean(mine[first:rounds:k]), _mean(exact[:rounds])) for first in range(k)] if rounds else []
    return {
        "model": row["model"], "variant": f"every={k}" if row["variant"] == EXACT else f"{row['variant']}, every={k}",
        "reason": None, "ratio_median": 1 + (row["ratio_median"] - 1) / k,
        "cosine_error": row["cosine_error"], "cosine_bias": row["cosine_bias"],
        "angle_of_mean": statistics.mean(angles) if angles else None,
        "noise": math.sqrt(k * row["noise"] ** 2 + k - 1),
    }  # fmt: skip


def _batches(model_name: str, gradients: Sequence[Tensor]) -> Row:
    """How far the exact gradients of single batches are off their mean, as noise of that mean."""
    if len(gradients) < 2:
        return {"model": model_name, "variant": BATCHES, "reason": None}
    count, mean = len(gradients), _mean(gradients)
    spread = sum(float((g - mean).square().sum()) for g in gradients) / (count - 1)
    # |mean|^2 has the noise of a mean of `count` in it.
    true = max(float(mean.square().sum()) - spread / count, 1e-12)
    angles = [angle(g, mean) for g in gradients]
    return {
        "model": model_name, "variant": BATCHES, "reason": None, "noise": math.sqrt(spread / true),
        "angle_mean": statistics.mean(angles), "angle_deviation": statistics.pstdev(angles),
    }  # fmt: skip


def _noise(gradients: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    off = sum(float((a - b).square().sum()) for a, b in zip(gradients, exact, strict=True))
    return math.sqrt(off / sum(float(b.square().sum()) for b in exact))


def _mean(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(gradients)).mean(0)


def angle(a: Tensor, b: Tensor) -> float:
    """In degrees."""
    a, b = a.double(), b.double()
    return math.degrees(math.acos(max(-1.0, min(1.0, float(a @ b / (a.norm() * b.norm()))))))


def add_peaks(rows: list[Row], model_name: str, options: Any) -> None:
    """Peak memory of every setting, in a process of its own; `every=k` needs what an exact step needs."""
    base: Row | None = None
    peaks: dict[str, Row] = {}
    for row in rows:
        if row["variant"] == BATCHES:
            continue
        name = row["variant"].partition("every=")[0].rstrip(", ") or EXACT
        if name not in peaks:
            point = {
                "model": model_name, "variant": name, "labeled": options.labeled, "pairs": options.pairs, "steps": 1,
                "threads": options.threads, "clock": options.clock, "device": options.device,
            }  # fmt: skip
            peaks[name] = measure(point, timeout=3600, limit_bytes=memory_limit())
            base = peaks[name] if base is None else base
            peaks[name] = with_ratios(peaks[name], base)
        row |= {key: peaks[name].get(key) for key in ("peak_mb", "peak_ratio")}


@dataclass
class Gradients:
    """An engine that keeps the gradients of every sample of the last call, and compares them without projection."""

    weak: list[list[Tensor]] = field(default_factory=list)
    strong: list[list[Tensor]] = field(default_factory=list)

    def products(self, problem: Problem) -> GradProducts:
        """See `gradconsist.engines.Engine`."""
        parameters = list(problem.parameters.values())
        self.weak, self.strong = [], []  # the first call is the trial of one pair
        for kept, view in ((self.weak, problem.weak), (self.strong, problem.strong)):
            for i in range(len(problem.target)):
                with torch.enable_grad():
                    loss = problem.losses(take(view, slice(i, i + 1)), problem.target[i : i + 1], None).sum()
                kept.append([g.unsqueeze(0) for g in torch.autograd.grad(loss, parameters)])
        weak, strong = (torch.stack([torch.cat([g.flatten() for g in s]) for s in v]) for v in (self.weak, self.strong))
        return GradProducts(weak.square().sum(1), strong.square().sum(1), (weak * strong).sum(1))


def rank_rows(model: Any, model_name: str, options: Any) -> list[Row]:
    """Errors of squared norms and cosines at every rank, and the bound on the former."""
    torch.manual_seed(0)
    batch = make_batch(model_name, options.labeled, options.pairs, device=options.device)
    with torch.no_grad():
        target = model(batch.weak).argmax(1)
    kept = Gradients()
    weight = torch.zeros(len(target), device=target.device)
    weight[: options.samples] = 1
    loss = GradientConsistencyLoss(model, encoder=model.encoder, engine=kept, chunk_size=None)
    cosines = loss.measure(batch.weak, batch.strong, target, weight).cosine[: options.samples]
    views = [[torch.cat(parts) for parts in zip(*view, strict=True)] for view in (kept.weak, kept.strong)]
    squared = torch.stack([g.flatten(1).square().sum(1) for g in views[0]]).sum(0)
    rows = []
    for dim in (4, 8, 16, 32):
        projectors = [RandomProjection(dim, seed=1000 * dim + i).projector() for i in range(options.draws)]
        norm_errors, cosine_errors = [], []
        for projector in projectors:
            weak, strong = (projector.sketches(view) for view in views)
            ww, ss, ws = (
                torch.stack([(a * b).flatten(1).sum(1) for a, b in zip(x, y, strict=True)]).sum(0)
                for x, y in ((weak, weak), (strong, strong), (weak, strong))
            )
            norm_errors.append(ww / squared - 1)
            cosine_errors.append(ws / (ww * ss).sqrt() - cosines)
        off = torch.stack(cosine_errors)
        shrunk = [_variance(g, dim) for g in views[0] if projectors[0].shrinks(g.shape[1:])]
        bound = torch.stack(shrunk).sum(0) / squared.square() if shrunk else torch.zeros([])
        rows.append({
            "model": model_name, "dim": dim, "reason": None, "norm_error": _rms(torch.stack(norm_errors)),
            "norm_bound": float(bound.mean().sqrt()), "cosine_error": _rms(off),
            "cosine_bias": float(off.mean()),
        })  # fmt: skip
    return rows


def _variance(gradients: Tensor, dim: int) -> Tensor:
    """(4/k + 2/k^2) |G G^T|^2 + 2/k^2 |G|^4 of every sample."""
    g = gradients.flatten(2)
    gram = g @ g.transpose(1, 2) if g.shape[1] <= g.shape[2] else g.transpose(1, 2) @ g
    own = g.flatten(1).square().sum(1).square()
    return (4 / dim + 2 / dim**2) * gram.flatten(1).square().sum(1) + 2 / dim**2 * own


def _rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


if __name__ == "__main__":
    main()
