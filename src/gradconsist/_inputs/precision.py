"""Sums in float32 at least: in 16 bits a sum of squares loses digits, and may overflow where its terms do not."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of `tensor`, or float32 where that is narrower."""
    return torch.promote_types(tensor.dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in `wide_dtype`; the same object where it has it already."""
    return tensor.to(wide_dtype(tensor))
