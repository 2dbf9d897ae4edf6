"""`consistency_bound`: measures both sides of Proposition 1 on a model and a batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradconsist._inputs.batch import check_inputs, doubled, in_order_of, leaves, map_leaves, map_members
from gradconsist._inputs.options import check_count
from gradconsist.diagnostics.same_loss import double_of, statistics_here
from gradconsist.errors import InputTypeError, InputValueError
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.types import ConsistencyRecord, Inputs

_ROUNDING = 1e-11  # of the squared norms, whose inner products have a relative error of about 1e-15


@dataclass(frozen=True)
class BoundReport:
    """Both sides of E[GC] >= 1 - L^2 sigma^2 / ||g||^2, over the n pairs that have a cosine.

    Attributes:
        cosine: GC(u), [n].
        norm: ||g_w||, [n].
        distance: ||s - w||, [n].
        lipschitz: the largest secant ||g(x') - g(x)|| / ||x' - x|| between neighbours on the segment from w to s, [n].
        segments: number of parts of that segment.
        left_out: number of pairs without a cosine, or whose views are the same input.
    """

    cosine: Tensor = field(repr=False)
    norm: Tensor = field(repr=False)
    distance: Tensor = field(repr=False)
    lipschitz: Tensor = field(repr=False)
    segments: int
    left_out: int

    @property
    def left(self) -> float:
        """The left side: mean GC."""
        return float(self.cosine.mean())

    @property
    def smoothness(self) -> float:
        """L: the largest secant of all pairs, a lower bound of the true constant."""
        return float(self.lipschitz.max())

    @property
    def sigma(self) -> float:
        """sigma: the root mean square of ||s - w||."""
        return float(self.distance.square().mean().sqrt())

    @property
    def right(self) -> float:
        """The right side with one L for all pairs: mean of 1 - L^2 ||s - w||^2 / ||g_w||^2."""
        return float((1 - (self.smoothness * self.distance / self.norm).square()).mean())

    @property
    def right_by_pair(self) -> float:
        """The right side with each pair's own L, the tightest form: mean of 1 - (L_u ||s - w|| / ||g_w||)^2."""
        return float((1 - (self.lipschitz * self.distance / self.norm).square()).mean())

    @property
    def covered(self) -> float:
        """Share of pairs with L ||s - w|| <= ||g_w||, for which the proposition is proved."""
        return float((self.smoothness * self.distance <= self.norm).double().mean())

    @property
    def covered_by_pair(self) -> float:
        """The same share with each pair's own L."""
        return float((self.lipschitz * self.distance <= self.norm).double().mean())

    @property
    def vacuous(self) -> bool:
        """Whether `right` is at most -1: every cosine is at least that, so the bound says nothing."""
        return self.right <= -1

    @property
    def vacuous_by_pair(self) -> bool:
        """Whether even `right_by_pair` is at most -1."""
        return self.right_by_pair <= -1

    @property
    def holds(self) -> bool:
        """Whether the left side is at least `right_by_pair`, and so `right`."""
        return self.left >= self.right_by_pair

    def __str__(self) -> str:
        def side(value: float, vacuous: bool, covered: float) -> str:
            verdict = "VACUOUS (no cosine is below -1)" if vacuous else "informative"
            return f"{value:.4g}, {verdict}; the proof covers {covered:.0%} of the pairs"

        lines = [
            f"mean GC {self.left:.4f} over {len(self.cosine)} pairs ({self.left_out} left out)",
            f"bound with one L: {side(self.right, self.vacuous, self.covered)}",
            f"bound with each pair's L: {side(self.right_by_pair, self.vacuous_by_pair, self.covered_by_pair)}",
            f"L >= {self.smoothness:.4g} (largest secant, {self.segments} parts per pair), sigma = {self.sigma:.4g}"
            f" (root mean square of ||s - w||), ||g_w|| from {float(self.norm.min()):.3g} to"
            f" {float(self.norm.max()):.3g}",
        ]
        if not self.holds:
            lines.append("the mean GC is BELOW the bound: possible only where pairs are not covered")
        return "\n".join(lines)


def consistency_bound(
    consistency: GradientConsistencyLoss,
    weak: Inputs,
    strong: Inputs,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    segments: int = 1,
) -> BoundReport:
    """Measures E[GC] and 1 - L^2 sigma^2 / ||g||^2 (the paper's Proposition 1) on a loss's own model.

    Here g(x) is the gradient of one sample's loss with respect to E, as the loss compares it; w and s are the views.

    - **L** is the Lipschitz constant of g *in the input*. It is estimated from below, by the largest secant
      ||g(x') - g(x)|| / ||x' - x|| of neighbours on the segment from w to s, cut into `segments` parts. Nothing bounds
      L from above, so `right` is an upper estimate of what the proposition promises.
    - **sigma** is the distance ||s - w|| of the drawn views: one draw per pair, no expectation over augmentations.
    - **||g||** is ||g_w|| of each pair.

    `weak`, `strong`, `target` and `weight` are those of a call of the loss; pairs of weight 0 are left out, and other
    weights count as 1. Everything runs in float64 on a copy of the model, so the `loss_fn` must work in float64.
    Dropout is off. BatchNorm's statistics of both views stay constant, also along the segments; joint ones replace
    ``batchnorm="observed"``. It costs `segments` + 1 calls of ``measure``.

    Returns:
        The report; ``print(report)`` shows whether the bound is vacuous.

    Raises:
        ConfigError: `segments` is not a positive integer, or `consistency` is not a GradientConsistencyLoss.
        InputTypeError: the views differ in a tensor that is not floating point, so they have no distance.
        InputValueError: no pair has a cosine, or gradients of neighbours agree up to rounding.

    Source: the paper's appendix A. docs/theory.md gives the proof and its assumptions.

    Example:
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x = torch.randn(6, 4)
        >>> gc = GradientConsistencyLoss(model)
        >>> report = consistency_bound(gc, x, x + 0.05 * torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> report.left >= report.right_by_pair >= report.right
        True
    """
    check_count("segments", segments)
    loss = double_of(consistency, dropout="off", reduction="mean")
    weak, strong = (map_members(doubled, check_inputs(*view)) for view in (("weak", weak), ("strong", strong)))
    target = doubled(target)
    record = loss.measure(weak, strong, target, weight)  # also checks the arguments
    strong = in_order_of(weak, strong)
    statistics = statistics_here(loss, weak, strong)
    distance = _distance(weak, strong)
    kept = record.compared & ~record.degenerate & (distance > 0)
    if not bool(kept.any()):
        raise InputValueError(
            "no pair is left: give pairs of positive weight whose views differ and whose gradients do not vanish."
        )
    secants = [_difference(replace(record, compared=kept)) / distance]
    loss.min_norm = 1e-18  # along the segment, gradients may be small
    for part in range(segments if segments > 1 else 0):
        first, second = (_between(weak, strong, (part + side) / segments) for side in (0, 1))
        ends = loss.measure(first, second, target, kept.double(), statistics=statistics)
        secants.append(_difference(ends) * segments / distance)
    lipschitz = torch.stack(secants).nan_to_num(0.0).amax(0)
    return BoundReport(
        cosine=record.cosine[kept],
        norm=record.norm_weak[kept],
        distance=distance[kept],
        lipschitz=lipschitz[kept],
        segments=segments,
        left_out=int((~kept).sum()),
    )


def _difference(record: ConsistencyRecord) -> Tensor:
    """Computes ||a - b|| from ||a||, ||b|| and the cosine, which is NaN if one is zero.

    Refuses a and b that are so close that 1 - cosine is mostly rounding.
    """
    a, b = record.norm_weak, record.norm_strong
    squared = (a - b).square() + 2 * a * b * (1 - record.cosine.nan_to_num(0.0))
    lost = record.compared & ~record.degenerate & (squared <= _ROUNDING * (a.square() + b.square()))
    if bool(lost.any()):
        raise InputValueError(
            f"the gradients of {int(lost.sum())} pairs of neighbours agree up to rounding, so no L can be computed from"
            " them: use fewer `segments`, views that are further apart, or weight 0 for pairs whose gradient does not"
            " depend on the input."
        )
    return squared.clamp(min=0.0).sqrt()


def _distance(weak: Inputs, strong: Inputs) -> Tensor:
    """Computes ||s - w|| over all floating tensors of a sample, [B]."""
    squares = []
    for a, b in zip(leaves(weak), leaves(strong), strict=True):
        if a.is_floating_point():
            squares.append((b - a).reshape(len(a), -1).square().sum(1))
        elif not torch.equal(a, b):
            raise InputTypeError("`weak` and `strong` differ in an integer tensor, so they have no distance.")
    if not squares:
        raise InputTypeError("`weak` has no floating tensor, so its views have no distance: pass embeddings.")
    return torch.stack(squares).sum(0).sqrt()


def _between(weak: Inputs, strong: Inputs, part: float) -> Inputs:
    mixed: Inputs = map_leaves(lambda a, b: torch.lerp(a, b, part) if a.is_floating_point() else a, weak, strong)
    return mixed
