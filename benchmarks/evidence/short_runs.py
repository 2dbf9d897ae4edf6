"""One short training run on small images, by setting and seed: what search_settings.py repeats many times.

A network of two or three convolutions, 16 labeled and 32 unlabeled images a step, SGD with the schedule of FixMatch.
Runs of one seed share labeled images, initial weights, batches and views, whatever else their settings are; with fewer
labels, a part of the labeled images. BatchNorm's running statistics lag behind the weights, so they are recomputed at
the end.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2] / "examples")]
from small_images import Images

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, StepOutput, ViewPair
from gradconsist.methods import FixMatch, MeanTeacher, PseudoLabel
from trainer.optimizer import build_optimizer, set_learning_rate

LABELED, UNLABELED = 16, 32  # images of a step


@dataclass(frozen=True)
class Setting:
    """What is trained: by default FixMatch with 40 labels and without the term (weight 0).

    Attributes:
        method: fixmatch, pseudolabel, meanteacher, supervised, or two-views (the labeled images' own two views).
        labels: labeled images in all.
        norm: batch, group or none.
        weight: of the term. Negative: so many times the norm of the other losses' gradient, step by step.
        gate: method (confident pairs) or all.
        compared: encoder, first or last (one of its convolutions, with its norm layer).
        start: share of the steps before the term is added.
        constant: weak or strong, for `stop_gradient`.
        statistics: `batchnorm` of the loss, or through for `through_statistics`.
    """

    method: str = "fixmatch"
    labels: int = 40
    norm: str = "batch"
    weight: float = 0.0
    gate: str = "method"
    compared: str = "encoder"
    start: float = 0.25
    constant: str | None = None
    statistics: str = "auto"

    @property
    def base(self) -> Setting:
        """The same training without the term."""
        method = "supervised" if self.method == "two-views" else self.method
        return Setting(method, self.labels, self.norm)

    @property
    def title(self) -> str:
        """Name of a setting without the term."""
        name = {"fixmatch": "FixMatch", "pseudolabel": "pseudo-labels", "meanteacher": "Mean Teacher"}
        norm = {"batch": "", "group": ", GroupNorm", "none": ", no norm layer"}[self.norm]
        return f"{name.get(self.method, 'labels alone')}{norm}, {self.labels} labels"


MIDDLE = Setting(weight=0.3)
CLAIM = {"weight 0.1": Setting(weight=0.1)}
SETTINGS = {
    **{f"weight {weight:g}": Setting(weight=weight) for weight in (0.01, 0.1, 0.3, 1.0, 10.0)},
    **{f"{share:g} of the other gradients' norm": Setting(weight=-share) for share in (0.1, 0.3, 1.0)},
    **{
        f"weight 0.3, {name}": dataclasses.replace(MIDDLE, **changes)
        for name, changes in {
            "every pair": {"gate": "all"},
            "first convolution": {"compared": "first"},
            "last convolution": {"compared": "last"},
            "from the first step": {"start": 0.0},
            "second half only": {"start": 0.5},
            "weak view constant": {"constant": "weak"},
            "running statistics": {"statistics": "running"},
            "through statistics": {"statistics": "through"},
            "GroupNorm": {"norm": "group"},
            "no norm layer": {"norm": "none"},
            "10 labels": {"labels": 10},
            "20 labels": {"labels": 20},
            "10 labels, GroupNorm": {"labels": 10, "norm": "group"},
            "pseudo-labels": {"method": "pseudolabel"},
            "Mean Teacher": {"method": "meanteacher"},
            "labels alone": {"method": "supervised"},
            "labels alone, their own two views": {"method": "two-views"},
        }.items()
    },
}


class LabelsAlone(nn.Module):
    """Trains on the labeled images; the term, if any, compares pairs that no other loss sees."""

    def __init__(self, model: nn.Module, pairs: str | None, threshold: float) -> None:
        super().__init__()
        self.model, self.pairs, self.threshold = model, pairs, threshold

    def forward(self, batch: SSLBatch) -> StepOutput:
        """The labeled loss; a pair has true labels (`own`), or confident pseudo-labels (`unlabeled`)."""
        pair = ViewPair(batch.weak, batch.strong, batch.y) if self.pairs == "own" else None
        if self.pairs == "unlabeled":
            state = [buffer.clone() for buffer in self.model.buffers()]  # pseudo-labels change nothing that is trained
            with torch.no_grad():
                confidence, target = self.model(batch.weak).softmax(1).max(1)
                for buffer, stored in zip(self.model.buffers(), state, strict=True):
                    buffer.copy_(stored)
            pair = ViewPair(batch.weak, batch.strong, target, (confidence >= self.threshold).float())
        return StepOutput(F.cross_entropy(self.model(batch.x), batch.y), pair)


def network(images: Images, norm: str) -> nn.Sequential:
    """Convolutions as encoder, a linear head; images to logits."""
    layer = {"batch": nn.BatchNorm2d, "group": lambda width: nn.GroupNorm(4, width), "none": lambda _: nn.Identity()}
    x = images.parts["train"][0]
    widths = [x.shape[1], *(images.width * 2**place for place in range(images.depth))]
    encoder = nn.Sequential()
    for place, (before, width) in enumerate(pairwise(widths)):
        convolution = nn.Conv2d(before, width, 3, stride=1 if place == 0 else 2, padding=1)
        encoder.append(nn.Sequential(convolution, layer[norm](width), nn.ReLU()))
    if images.pool > 1:
        encoder.append(nn.AvgPool2d(images.pool))
    encoder.append(nn.Flatten())
    size = x.shape[-1] // 2 ** (images.depth - 1) // images.pool
    return nn.Sequential(encoder, nn.Linear(widths[-1] * size**2, images.classes))


def method_of(setting: Setting, model: nn.Module, threshold: float, steps: int) -> nn.Module:
    """The method, without the term."""
    ramp = int(0.4 * steps)
    if setting.method == "fixmatch":
        return FixMatch(model, threshold=threshold, joint=False)
    if setting.method == "pseudolabel":
        return PseudoLabel(model, threshold=threshold, unlabeled_ramp_steps=ramp)
    if setting.method == "meanteacher":
        return MeanTeacher(model, unlabeled_ramp_steps=ramp)
    pairs = None if not setting.weight else "own" if setting.method == "two-views" else "unlabeled"
    return LabelsAlone(model, pairs, threshold)


def term_of(setting: Setting, model: nn.Module, depth: int) -> GradientConsistencyLoss:
    """The gradient consistency term."""
    through = setting.statistics == "through"
    compared = {"encoder": "0.", "first": "0.0.", "last": f"0.{depth - 1}."}[setting.compared]
    return GradientConsistencyLoss(
        model,
        encoder=lambda name: name.startswith(compared),
        batchnorm="auto" if through else setting.statistics,  # type: ignore[arg-type]
        through_statistics=through,
        stop_gradient=setting.constant,  # type: ignore[arg-type]
    )


@lru_cache(maxsize=8)
def batches(images: Images, labels: int, seed: int, steps: int) -> tuple[list[SSLBatch], list[SSLBatch]]:
    """A run's batches, and the same with the labeled images' two views as pairs."""
    pool, target = images.parts["train"]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool), generator=generator)
    of_class = (order[target[order] == label][: labels // images.classes] for label in range(images.classes))
    ours = torch.cat(list(of_class))
    chosen = ours[torch.randint(len(ours), (steps * LABELED,), generator=generator)]
    drawn = pool[chosen], pool[torch.randint(len(pool), (steps * UNLABELED,), generator=generator)]
    (x, x_strong), (u, u_strong) = (
        [view(part, generator).split(len(part) // steps) for view in (images.weak, images.strong)] for part in drawn
    )
    y = target[chosen].split(LABELED)
    pairs = (u, u_strong), (x, x_strong)
    of_unlabeled, of_labeled = ([SSLBatch(*step) for step in zip(x, y, *pair, strict=True)] for pair in pairs)
    return of_unlabeled, of_labeled


def train(images: Images, setting: Setting, seed: int, steps: int) -> tuple[nn.Module, float]:
    """One run.

    Returns:
        The network with BatchNorm's statistics taken anew, and seconds of processor time, without those for the views.
    """
    of_unlabeled, of_labeled = batches(images, setting.labels, seed, steps)
    torch.manual_seed(seed)
    model = network(images, setting.norm)
    method = method_of(setting, model, images.threshold, steps)
    term = term_of(setting, model, images.depth)
    start = int(setting.start * steps)
    if setting.weight > 0:
        method = GGCRWrapper(method, term, weight=setting.weight, warmup_steps=start, gate=setting.gate)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, lr=0.05, weight_decay=5e-4)
    began = time.process_time()
    for step, batch in enumerate(of_labeled if setting.method == "two-views" else of_unlabeled):
        set_learning_rate(optimizer, 0.05, step, steps)
        optimizer.zero_grad()
        out = method(batch)
        out.loss.backward()
        if setting.weight < 0 and step >= start:
            add_in_proportion(term, out.pair, model, -setting.weight)
        optimizer.step()
    seconds = time.process_time() - began
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the plain mean
    if norms:
        with torch.no_grad():
            model(images.parts["train"][0])
    return model.eval(), seconds


def add_in_proportion(term: GradientConsistencyLoss, pair: ViewPair, model: nn.Module, share: float) -> None:
    """Add the term's gradient to `.grad`, at `share` times the norm of what is there."""
    before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    term(*pair).backward()
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    sizes = [float(torch.stack([part.norm() for part in parts]).norm()) for parts in (before, own)]
    scale = share * sizes[0] / sizes[1] if sizes[1] > 0 else 0.0  # 0 where no pair is confident
    for parameter, rest, part in zip(model.parameters(), before, own, strict=True):
        parameter.grad = rest + scale * part


def accuracy(images: Images, model: nn.Module, part: str) -> float:
    """Share of the images of a part that are recognised."""
    x, labels = images.parts[part]
    with torch.no_grad():
        return float((model(x).argmax(1) == labels).float().mean())
