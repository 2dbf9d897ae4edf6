"""Does gradient consistency make minima flat? FixMatch with and without it on scikit-learn's digits.

    python benchmarks/evidence/flatness.py --output benchmarks/results/flatness.json

A small convolutional network is trained with 40 labels, three seeds a method, the same split, initial weights, images
and augmentation within a seed. Then, in eval mode: SAM's sharpness (one ascent step, and five) and the top eigenvalue
of the Hessian, both of the mean loss on training images with their true labels; the mean GC and both sides of
Proposition 1 on pairs of views with the pseudo-labels of the weak ones, confident or not, so that all networks see the
same pairs; the test accuracy.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/shared"))
from environment import write_result
from harness import Row, heading, parse, parser, setting, show

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist.diagnostics import consistency_bound, sharpness, top_eigenvalue
from gradconsist.methods import FixMatch

METHODS = {"FixMatch": 0.0, "FixMatch + GGCR": 0.1}
COLUMNS = {
    "method": "<15", "seed": "4d", "accuracy": "8.4f", "loss": "8.4f", "sharpness": "9.4f", "sharpness_5": "11.4f",
    "eigenvalue": "10.2f", "residual": "8.0e", "gc": "7.4f", "bound_by_pair": "13.3g", "bound": "9.3g",
}  # fmt: skip


class Network(nn.Module):
    """Two convolutions with BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 24, 3, padding=1, stride=2), nn.BatchNorm2d(24), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 1, 8, 8] to logits [B, 10]."""
        return self.head(self.encoder(x))


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images [1, 8, 8] of mean about 0, and their classes, in an order that is drawn once."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8.0 - 0.6
    return x[order], torch.tensor(labels)[order]


def weak_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by at most one pixel."""
    padded = nn.functional.pad(x, (1, 1, 1, 1), value=-0.6)
    moves = torch.randint(3, (len(x), 2), generator=generator).tolist()
    return torch.stack([image[:, r : r + 8, c : c + 8] for image, (r, c) in zip(padded, moves, strict=True)])


def strong_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted, with other contrast and noise, and a square of three pixels cut out."""
    y = weak_view(x, generator) * (0.6 + 0.8 * torch.rand(len(x), 1, 1, 1, generator=generator))
    y = y + 0.2 * torch.randn(y.shape, generator=generator)
    for image, (r, c) in zip(y, torch.randint(6, (len(x), 2), generator=generator).tolist(), strict=True):
        image[:, r : r + 3, c : c + 3] = -0.6
    return y


def train(seed: int, weight: float, steps: int, x: Tensor, y: Tensor) -> Network:
    """One run on 40 labels; everything that is drawn depends on the seed alone."""
    torch.manual_seed(seed)
    model, draw = Network(), torch.Generator().manual_seed(seed)
    labeled = torch.cat([(y == c).nonzero().squeeze(1)[4 * seed : 4 * seed + 4] for c in range(10)])
    method = FixMatch(model, threshold=0.95, unlabeled_ramp_steps=steps // 4)
    step: nn.Module = method
    if weight:
        term = GradientConsistencyLoss(model, encoder=model.encoder)
        step = GGCRWrapper(method, term, weight=weight, warmup_steps=steps // 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        few = labeled[torch.randint(40, (20,), generator=draw)]
        many = torch.randint(len(x), (60,), generator=draw)
        batch = SSLBatch(weak_view(x[few], draw), y[few], weak_view(x[many], draw), strong_view(x[many], draw))
        optimizer.zero_grad()
        step(batch).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def measured(model: Network, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, pairs: int) -> Row:
    """What the page shows of one trained network."""
    draw = torch.Generator().manual_seed(1234)
    one, five = (sharpness(model, x, y, rho=0.05, ascent_steps=steps) for steps in (1, 5))
    top = top_eigenvalue(model, x, y, max_steps=40)
    weak, strong = weak_view(x[:pairs], draw), strong_view(x[:pairs], draw)
    with torch.no_grad():
        target = model(weak).argmax(1)
        accuracy = float((model(test_x).argmax(1) == test_y).float().mean())
    bound = consistency_bound(GradientConsistencyLoss(model, encoder=model.encoder), weak, strong, target)
    return {
        "accuracy": accuracy, "loss": one.loss, "sharpness": one.sharpness, "sharpness_5": five.sharpness,
        "eigenvalue": top.value, "residual": top.residual, "gc": bound.left, "bound": bound.right,
        "bound_by_pair": bound.right_by_pair, "covered": bound.covered, "covered_by_pair": bound.covered_by_pair,
        "holds": bound.holds, "vacuous": bound.vacuous, "vacuous_by_pair": bound.vacuous_by_pair,
        "lipschitz": bound.smoothness, "sigma": bound.sigma, "pairs": len(bound.cosine), "left_out": bound.left_out,
    }  # fmt: skip


def point(point: tuple[int, str, Namespace]) -> Row:
    """One network, trained and measured."""
    seed, method, options = point
    torch.set_num_threads(options.threads or torch.get_num_threads())
    x, y = digits()
    train_x, train_y, test_x, test_y = x[:1297], y[:1297], x[1297:], y[1297:]
    start = time.process_time()
    model = train(seed, METHODS[method], options.steps, train_x, train_y)
    found = measured(model, train_x[: options.images], train_y[: options.images], test_x, test_y, options.pairs)
    return {"method": method, "seed": seed, **found, "cpu_seconds": time.process_time() - start}


def differences(rows: list[Row]) -> list[Row]:
    """Of every quantity, seed by seed, each method minus FixMatch."""
    by = {(row["method"], row["seed"]): row for row in rows}
    found = []
    for method in list(METHODS)[1:]:
        for quantity in ("accuracy", "sharpness", "sharpness_5", "eigenvalue", "gc"):
            each = [row[quantity] - by["FixMatch", seed][quantity] for (m, seed), row in by.items() if m == method]
            found.append({"method": method, "quantity": quantity, "mean": statistics.mean(each), "each": each})
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--images", type=int, default=300, help="training images of which the loss is measured")
    made.add_argument("--pairs", type=int, default=100)
    made.add_argument("--processes", type=int, default=1, help="networks at a time; changes no number but the seconds")
    options = parse(made, seeds=1, steps=8, images=40, pairs=16)
    points = [(seed, method, options) for seed in range(options.seeds) for method in METHODS]
    heading(COLUMNS)
    rows: list[Row] = []
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for row in pool.map(point, points):
            rows.append(row)
            show([row], COLUMNS)
    if options.output:
        result = {"setting": setting(options, "seeds", "steps", "images", "pairs"), "rows": rows}
        write_result(options.output, {**result, "differences": differences(rows)})


if __name__ == "__main__":
    main()
