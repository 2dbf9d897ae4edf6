"""Puts the uses of all parameters of a chunk together: chooses a form for each, and computes their inner products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gradconsist.engines.ghost.gram import Doubts, interleaved, lost, pair_gram, pair_gram_of_two
from gradconsist.engines.ghost.rules import EmbeddingWeight, LinearWeight, Rule

Form: TypeAlias = Literal["auto", "gradient", "gram"]
FORMS = ("auto", "gradient", "gram")

# Gradients with at most so many numbers per sample are compared as one vector, to launch fewer kernels for a copy.
_SMALL = 2**14


def joined(calls: Sequence[tuple[LinearWeight | EmbeddingWeight, Tensor | None, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins several uses of one weight, also as a table of embeddings, into one linear layer with more positions.

    Returns input [N, T, c] and output gradient [N, T, p] of y = x W^T.
    """
    xs, ds = zip(*(rule.rows(x, d) for rule, x, d in calls), strict=True)
    return torch.cat(xs, 1), torch.cat(ds, 1)


def chosen(rule: Rule, x: Tensor | None, d: Tensor, form: Form) -> str:
    """Returns the form for one use: the requested one, or the cheaper one; "gradient" if there is no choice."""
    formed, direct = rule.costs(x, d)
    if not math.isfinite(direct):
        return "gradient"
    if form == "auto":
        return "gram" if direct < formed else "gradient"
    return form


class Parts:
    """Collects the uses and gradients of all parameters of a chunk, and computes their M with few kernels."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._small: list[Tensor] = []
        self._grams: list[Tensor] = []
        self._doubts: Doubts = []
        self._doubtful: list[tuple[int, Rule, Tensor | None, Tensor]] = []  # what the doubts are about

    def add(self, rule: Rule, x: Tensor | None, d: Tensor) -> None:
        """Adds one use, interleaved; takes the arguments of `chosen`."""
        known = len(self._doubts)
        gram = rule.gram(x, d, self._doubts) if chosen(rule, x, d, self._form) == "gram" else None
        if gram is None:
            self.add_gradients(rule.gradients(x, d))
            return
        self._doubtful += [(len(self._grams), rule, x, d)] * (len(self._doubts) - known)
        self._grams.append(gram)

    def add_gradients(self, gradients: Tensor | None) -> None:
        """Adds per-sample gradients or sketches [N, ...], interleaved; None adds nothing."""
        if gradients is None:
            return
        if gradients[0].numel() > _SMALL:
            self._grams.append(pair_gram(gradients))
        else:
            self._small.append(gradients)

    def add_two_gradients(self, weak: Tensor | None, strong: Tensor | None) -> None:
        """Adds gradients or sketches [n, ...] of views that come separately; None stands for zero."""
        given = strong if weak is None else weak
        if given is None:
            return
        views = tuple(torch.zeros_like(given) if view is None else view for view in (weak, strong))
        if given[0].numel() > _SMALL:
            self._grams.append(pair_gram_of_two(*views))
        else:
            self._small.append(interleaved(*views))

    def grams(self) -> list[Tensor]:
        """Returns M [n, 2, 2] of the parts, differentiable.

        Doubts are read here, all at once. A part that lost accuracy is computed again from gradients.
        """
        for place, rule, x, d in itertools.compress(self._doubtful, lost(self._doubts)):
            self._grams[place] = pair_gram(rule.gradients(x, d))
        return [*self._grams, *([pair_gram(*self._small)] if self._small else [])]


def products(rule: Rule, x: Tensor | None, d: Tensor, form: Form) -> Tensor:
    """Computes M [n, 2, 2] of one use, differentiable; takes the arguments of `chosen`."""
    parts = Parts(form)
    parts.add(rule, x, d)
    return parts.grams()[0]
