"""The seam: what an engine is given, and what it returns.

An engine knows how to differentiate the per-sample losses of two views with respect to the compared parameters. It
knows nothing of cosines, weights, chunks or reductions; those are written once, on top of `GradProducts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from gradconsist._inputs.batch import take
from gradconsist._inputs.precision import wide, wide_dtype
from gradconsist.engines.projection import Projector
from gradconsist.types import GradProducts, Inputs


class Losses(Protocol):
    """Per-sample losses, each a function of its own sample."""

    def __call__(
        self,
        inputs: Inputs,
        target: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        view: Tensor | int | None = None,
    ) -> Tensor:
        """Losses [B].

        Args:
            inputs: B samples.
            target: their targets.
            parameters: tensors in place of named parameters.
            view: 0 for weak, 1 for strong: which constants of BatchNorm are the samples' own; under vmap it may be a
                tensor [] with a value for each sample. None is an error where the two views' constants differ.

        Returns:
            Losses, in float32 at least.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """Pairs of views whose per-sample gradients are to be compared.

    Attributes:
        losses: ``(inputs, target, replacements, view) -> [B]``, see `Losses`.
        parameters: the compared parameters, E, by name.
        weak: weakly augmented inputs.
        strong: strongly augmented inputs.
        target: targets for both.
        graph_weak: whether the weak view's gradient keeps its graph.
        graph_strong: whether the strong view's gradient keeps its graph.
        random: whether the forward may draw random numbers.
        model: whose modules run, for engines with rules for modules; None if unknown.
        projection: whose sketches of the gradients are to be compared; None for the gradients themselves.
    """

    losses: Losses
    parameters: Mapping[str, Tensor]
    weak: Inputs
    strong: Inputs
    target: Tensor
    graph_weak: bool = True
    graph_strong: bool = True
    random: bool = False
    model: nn.Module | None = None
    projection: Projector | None = None

    def take(self, index: Tensor) -> Problem:
        """The same problem for the pairs `index`."""
        return replace(self, weak=take(self.weak, index), strong=take(self.strong, index), target=self.target[index])


class Engine(Protocol):
    """Anything with this method is an engine.

    It may also have ``preferred_chunk(problem) -> int``, the number of pairs at a time that `chunk_size="auto"` takes
    (without it, all pairs go at once), ``fall_back(error)``, a context manager in which a chunk that failed is tried
    once more, and ``projects = True``, which says that `products` follows `Problem.projection`: the products are then
    those of ``problem.projection.sketches(gradients)``. Without it a projection is refused.
    """

    def products(self, problem: Problem) -> GradProducts:
        """The three inner products of every pair, [B] each, in float32 at least.

        Where ``problem.graph_weak`` and ``problem.graph_strong`` say so, they are differentiable in every trainable
        parameter of the model, the compared ones included.

        Args:
            problem: the pairs.

        Returns:
            Inner products.
        """
        ...


def inner(first: list[Tensor], second: list[Tensor], keep: int = 0) -> Tensor:
    """⟨first, second⟩ over all tensors as one flat vector, summed in float32 at least.

    Args:
        first: gradients, one tensor a parameter.
        second: gradients in the same order.
        keep: number of leading dimensions that are not summed over.

    Returns:
        Tensor with `keep` dimensions.
    """
    terms = []
    for a, b in zip(first, second, strict=True):
        product = wide(a) * b.to(wide_dtype(a))
        terms.append(product.flatten(keep).sum(-1) if product.dim() > keep else product)
    return torch.stack(terms).sum(0)
