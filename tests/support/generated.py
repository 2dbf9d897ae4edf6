"""Models and pairs that hypothesis draws: every plan is one problem, and prints as what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss

from . import compare, models
from .zoo import Case, Mean, Problem, normal, tokens

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "relu": nn.ReLU,
    "leaky in place": lambda: nn.LeakyReLU(0.1, inplace=True),
}
INPUTS = {
    "mlp": normal(5),
    "conv1d": normal(3, 7),
    "conv2d": normal(3, 6, 5),
    "tokens": tokens(7, 4),
    "attention": normal(4, 4),
}


@dataclass(frozen=True)
class Plan:
    """A small network around a stem, a middle layer that may be used twice, and a head."""

    body: str
    pairs: int
    classes: int
    width: int
    activation: str
    norm: str  # "none", "per sample", "batch", "running"
    bias: bool
    twice: bool
    frozen_stem: bool
    soft: bool
    kernel: int
    stride: int
    padding: int
    dilation: int
    groups: int
    seed: int

    def problem(self, dtype: torch.dtype = torch.float64) -> Problem:
        classes = 3 if self.body == "attention" else self.classes
        case = Case("generated", self.build, INPUTS[self.body], classes, self.soft, training=self.norm != "running")
        p = case.problem(dtype=dtype, seed=self.seed, pairs=self.pairs)
        if self.frozen_stem:
            next(iter(p.model.children())).requires_grad_(False)
        return p

    @property
    def independent(self) -> bool:
        """Whether a sample's numbers are its own, that is, without statistics of the batch."""
        return self.norm != "batch" or self.body == "attention"

    def build(self) -> nn.Module:
        if self.body == "attention":
            return models.ScaledDotProduct()
        channels = (1 + self.width) * self.groups  # GroupNorm of a single number is refused by torch
        stem, middle, positions = self._layers(channels)
        steps = [stem, self._norm(channels), self._act(), middle, self._act()]
        if self.twice:
            steps += [middle, self._act()]
        steps += [Mean()] if positions else []
        return nn.Sequential(*steps, nn.Linear(channels, self.classes, bias=self.bias))

    def _layers(self, channels: int) -> tuple[nn.Module, nn.Module, bool]:
        if self.body == "mlp":
            return nn.Linear(5, channels, self.bias), nn.Linear(channels, channels, self.bias), False
        if self.body == "tokens":
            stem = nn.Sequential(nn.Embedding(7, channels), Transposed())
            return stem, nn.Conv1d(channels, channels, 1, bias=self.bias), True
        conv = nn.Conv1d if self.body == "conv1d" else nn.Conv2d
        stem = conv(3, channels, self.kernel, self.stride, self.padding, self.dilation, bias=self.bias)
        return stem, conv(channels, channels, 3, padding=1, groups=self.groups, bias=self.bias), True

    def _norm(self, channels: int) -> nn.Module:
        if self.norm == "none":
            return nn.Identity()
        if self.norm == "per sample":
            return nn.GroupNorm(1, channels)
        return nn.BatchNorm2d(channels) if self.body == "conv2d" else nn.BatchNorm1d(channels)

    def _act(self) -> nn.Module:
        return ACTIVATIONS[self.activation]()


class Transposed(nn.Module):
    """[B, T, channels] as [B, channels, T]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def plans(**fixed: Any) -> st.SearchStrategy[Plan]:
    """Any plan; fields may be fixed, or be given another strategy."""
    free: dict[str, st.SearchStrategy[Any]] = {
        "body": st.sampled_from(list(INPUTS)),
        "pairs": st.integers(1, 5),
        "classes": st.integers(2, 4),
        "width": st.integers(1, 3),
        "activation": st.sampled_from(list(ACTIVATIONS)),
        "norm": st.sampled_from(["none", "per sample", "batch", "running"]),
        "bias": st.booleans(),
        "twice": st.booleans(),
        "frozen_stem": st.booleans(),
        "soft": st.booleans(),
        "kernel": st.integers(1, 3),
        "stride": st.integers(1, 2),
        "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2),
        "groups": st.integers(1, 2),
        "seed": st.integers(0, 10**6),
    }
    given = {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fixed.items()}
    return st.builds(Plan, **{**free, **given})


@dataclass(frozen=True)
class Outcome:
    """What a call gave."""

    cosine: Tensor
    loss: Tensor
    gradient: Tensor  # dL_g/dtheta as one float64 vector
    degenerate: Tensor


def outcome(p: Problem, weight: Tensor | None = None, **options: Any) -> Outcome:
    """L_g of a problem, its derivative and its record."""
    gc = GradientConsistencyLoss(p.model, **options)
    loss = gc(*p.views, weight)
    assert gc.last is not None
    return Outcome(gc.last.cosine, loss.detach(), compare.gradient_of(loss, p.model), gc.last.degenerate)


def with_views(p: Problem, weak: Any = None, strong: Any = None, target: Tensor | None = None) -> Problem:
    """The same model on other pairs."""
    take = lambda new, old: old if new is None else new  # noqa: E731
    return Problem(p.case, p.model, take(weak, p.weak), take(strong, p.strong), take(target, p.target))


def rows(p: Problem, order: list[int]) -> Problem:
    return Problem(p.case, p.model, p.weak[order], p.strong[order], p.target[order])


def apart(gradient: Tensor, reference: Tensor, floor: float = 1e-2) -> float:
    """|gradient - reference| / |reference|, against at least `floor`: a gradient may be zero but for rounding."""
    return float((gradient - reference).norm() / reference.norm().clamp(min=floor))
