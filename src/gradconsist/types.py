"""The types that methods, wrapper and loss exchange.

Index letters: B pairs per call, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Constant: TypeAlias = bool | int | float | str | torch.dtype | torch.device | None
"""What a mapping or sequence may hold besides tensors. It goes to the model unchanged, the same for every sample."""

Inputs: TypeAlias = Tensor | Mapping[str, Tensor | Constant] | Sequence[Tensor | Constant]
"""What a model takes: a tensor (``model(x)``), a mapping (``model(**x)``) or a sequence (``model(*x)``).

A mapping or sequence holds tensors, batch first, and constants such as None, flags, numbers and strings.
"""

LossFunction: TypeAlias = Callable[[Any, Tensor], Tensor]
"""``(model output, target) -> per-sample losses [B]``."""


class GradProducts(NamedTuple):
    """Inner products of the two views' per-sample gradients, one row per pair.

    Attributes:
        weak: ||g_w||^2, [B].
        strong: ||g_s||^2, [B].
        cross: ⟨g_w, g_s⟩, [B].
        losses: the strong views' losses, [B], with their graph; None unless `Problem.with_losses` asks for them.
    """

    weak: Tensor
    strong: Tensor
    cross: Tensor
    losses: Tensor | None = None

    def present(self) -> list[Tensor]:
        """Returns the numbers that are there, in order."""
        return [part for part in self if part is not None]

    def isfinite(self) -> Tensor:
        """Tells which pairs [B] have finite numbers only."""
        return torch.isfinite(torch.stack(self.present())).all(0)


class ViewPair(NamedTuple):
    """The two views of one unlabeled batch that a method compared.

    Attributes:
        weak: weakly augmented inputs, batch first.
        strong: strongly augmented inputs of the same samples, in the same order.
        target: pseudo-labels for both views: class indices [B] or probabilities [B, C].
        weight: [B], non-negative; 0 leaves a pair out. None means 1 for all.
    """

    weak: Inputs
    strong: Inputs
    target: Tensor
    weight: Tensor | None = None


class StepOutput(NamedTuple):
    """What one call of a semi-supervised method returns.

    Attributes:
        loss: scalar with its graph.
        pair: what gradient consistency may compare; None where the step has no such pair.
        logs: numbers to log, each with its name.
    """

    loss: Tensor
    pair: ViewPair | None = None
    logs: Mapping[str, float | Tensor] = {}


@dataclass
class UnlabeledLoss:
    """Describes the unlabeled loss that a method leaves to its caller, with l the strong views' cross-entropies.

        factor * (mean of weight * l + constant)

    Attributes:
        together: whether a method with ``joint=True`` forwards labeled and weak inputs as one batch.
        weight: weights of the losses, [B].
        constant: what does not depend on the parameters: the negative entropy of soft targets, weighted.
        factor: mu(t).
    """

    together: bool = False
    weight: Tensor = field(default_factory=lambda: torch.zeros(0))
    constant: float | Tensor = 0.0
    factor: float = 0.0


class SSLBatch(NamedTuple):
    """One step's data: labeled inputs with labels, and two views of the unlabeled inputs.

    Inputs are tensors, or mappings or sequences of tensors and constants (text models). `x`, `weak` and `strong` must
    have the same structure.

    Attributes:
        x: labeled inputs.
        y: class indices of `x`.
        weak: weakly augmented unlabeled inputs.
        strong: strongly augmented inputs of the same unlabeled samples, in the same order.
        index: positions of the unlabeled samples in their data set, for methods that remember them.
    """

    x: Inputs
    y: Tensor
    weak: Inputs
    strong: Inputs
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls here


@dataclass(frozen=True)
class ConsistencyRecord:
    """Cosines and gradient norms of one comparison, as detached tensors [B], one entry per pair.

    Attributes:
        cosine: GC(u); NaN for pairs that were not compared or are degenerate.
        norm_weak: norm of the weak view's gradient; NaN for pairs that were not compared.
        norm_strong: norm of the strong view's gradient; NaN for pairs that were not compared.
        degenerate: pairs whose cosine is noise, because one of their norms is at most `min_norm`.
        compared: pairs of positive weight (and, with `max_pairs`, drawn in this call).
    """

    cosine: Tensor
    norm_weak: Tensor
    norm_strong: Tensor
    degenerate: Tensor
    compared: Tensor

    def summary(self) -> dict[str, float]:
        """Sums the record up in six numbers; means are NaN if nothing was compared.

        Returns:
            pairs, compared and degenerate as counts; cosine_mean over the pairs that have a cosine;
            norm_weak_mean and norm_strong_mean over the compared pairs.
        """
        return {
            "pairs": float(self.compared.numel()),
            "compared": float(self.compared.sum()),
            "degenerate": float(self.degenerate.sum()),
            "cosine_mean": float(self.cosine.nanmean()),
            "norm_weak_mean": float(self.norm_weak.nanmean()),
            "norm_strong_mean": float(self.norm_strong.nanmean()),
        }

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={value:.4g}" for name, value in self.summary().items())
        return f"ConsistencyRecord({numbers})"
