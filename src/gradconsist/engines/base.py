"""The interface of engines: their input `Problem`, and their output `GradProducts`.

An engine differentiates the per-sample losses of two views with respect to the compared parameters. It knows nothing of
cosines, weights, chunks or reductions, which are computed from `GradProducts` elsewhere.
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
    """Computes per-sample losses, each of which depends on its own sample only."""

    def __call__(
        self,
        inputs: Inputs,
        target: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        view: Tensor | int | None = None,
    ) -> Tensor:
        """Returns the losses [B].

        Args:
            inputs: B samples.
            target: their targets.
            parameters: replacements for parameters by name.
            view: 0 for weak, 1 for strong; selects the BatchNorm constants. Under vmap it may be a tensor [] with one
                value per sample. None is an error if the two views have different constants.

        Returns:
            Losses, in float32 at least.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """Pairs of views whose per-sample gradients are to be compared.

    Attributes:
        losses: ``(inputs, target, replacements, view) -> [B]``, see `Losses`.
        parameters: the compared parameters (E) and their names.
        weak: weakly augmented inputs.
        strong: strongly augmented inputs.
        target: targets for both views.
        graph_weak: whether the weak view's gradient keeps its graph.
        graph_strong: whether the strong view's gradient keeps its graph.
        random: whether the forward may draw random numbers.
        with_losses: whether the result holds the strong views' losses, too. Asked of engines with `gives_losses` only.
        model: the model, for engines with rules for modules; None if unknown.
        projection: compares sketches of the gradients instead of the gradients; None for the gradients.
    """

    losses: Losses
    parameters: Mapping[str, Tensor]
    weak: Inputs
    strong: Inputs
    target: Tensor
    graph_weak: bool = True
    graph_strong: bool = True
    random: bool = False
    with_losses: bool = False
    model: nn.Module | None = None
    projection: Projector | None = None

    def take(self, index: Tensor) -> Problem:
        """Returns the same problem for the pairs `index` only."""
        return replace(self, weak=take(self.weak, index), strong=take(self.strong, index), target=self.target[index])


class Engine(Protocol):
    """Any object with a method `products` is an engine.

    An engine may also have three attributes:

    - ``projects = True`` says that `products` supports `Problem.projection` and then returns the products of
      ``problem.projection.sketches(gradients)``. Without it, a projection raises an error.
    - ``gives_losses = True`` says that `products` supports `Problem.with_losses`. Without it, one pass cannot give both
      L_g and the strong views' losses.
    - ``most_pairs`` is the number of pairs beyond which a larger chunk gains nothing. ``chunk_size="auto"`` takes no
      more, and fewer if they would need too much memory.
    """

    def products(self, problem: Problem) -> GradProducts:
        """Returns the three inner products of every pair, [B] each, in float32 at least.

        Through the views with ``problem.graph_weak`` or ``problem.graph_strong``, they are differentiable in every
        trainable parameter of the model, including the compared ones.

        Args:
            problem: the pairs.

        Returns:
            Inner products.
        """
        ...


def inner(first: list[Tensor], second: list[Tensor], keep: int = 0) -> Tensor:
    """Computes ⟨first, second⟩ over all tensors as one flat vector, summed in float32 at least.

    Args:
        first: gradients, one tensor per parameter.
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
