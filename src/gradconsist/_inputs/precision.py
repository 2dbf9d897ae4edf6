"""Widens tensors to float32 before they are summed: in 16 bits a sum of squares loses digits and may overflow.

What needs float64 gets it, on the CPU where the device has none.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype of `tensor`, or float32 if that dtype is narrower."""
    return torch.promote_types(tensor.dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """Converts `tensor` to `wide_dtype`; returns the same object if it has that dtype already."""
    return tensor.to(wide_dtype(tensor))


@cache
def has_float64(device: torch.device) -> bool:
    """Tells whether a device computes in float64; MPS and some XPUs do not."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except torch.OutOfMemoryError:  # says nothing
        raise
    except (RuntimeError, TypeError):
        return False
    return True


def in_float64(tensor: Tensor) -> Tensor:
    """Converts a floating tensor to float64, and any tensor to the CPU if its device has no float64."""
    tensor = tensor if has_float64(tensor.device) else tensor.cpu()
    return tensor.double() if tensor.is_floating_point() else tensor
