"""Widens tensors to float32 before they are summed: in 16 bits a sum of squares loses digits and may overflow."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype of `tensor`, or float32 if that dtype is narrower."""
    return torch.promote_types(tensor.dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """Converts `tensor` to `wide_dtype`; returns the same object if it has that dtype already."""
    return tensor.to(wide_dtype(tensor))
