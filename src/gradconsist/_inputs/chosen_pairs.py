"""Chooses the pairs of a call to compare, and their weights in the sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradconsist._inputs.pairs import Pairs


@dataclass(frozen=True)
class Subset:
    """Indices [n] of the compared pairs, and their weights [n] with rescaling and reduction included."""

    index: Tensor
    weight: Tensor


def select(
    pairs: Pairs, max_pairs: int | None, reduction: str, generator: torch.Generator, dtype: torch.dtype
) -> Subset:
    """Selects the pairs of positive weight, or a random subset of them with weights that keep the expectation."""
    index = pairs.weight.detach().nonzero().squeeze(1)
    scale = 1.0
    if max_pairs is not None and len(index) > max_pairs:
        order = torch.randperm(len(index), generator=generator, device=generator.device)
        chosen = order[:max_pairs].sort().values.to(index.device)
        scale = len(index) / max_pairs
        index = index[chosen]
    if reduction == "mean":
        scale /= len(pairs)
    return Subset(index, pairs.weight[index].to(dtype) * scale)
