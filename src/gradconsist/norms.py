"""Euclidean norms whose second derivative is 0, and not NaN, at a zero vector.

Torch gives ||x|| the derivative 0 at x = 0, a subgradient, and divides by the norm on the way: differentiated once
more, 0 / 0 is NaN for the whole model. A map of zeros is not rare (a dead channel before a GRN, as in ConvNeXt V2, in
bfloat16 above all). Everywhere else these are torch's own kernels on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_EUCLIDEAN = ("fro", 2, 2.0)


def _norm(x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    zero = torch.linalg.vector_norm(x.detach(), 2, dim, keepdim=True) == 0
    value = torch.linalg.vector_norm(x.masked_fill(zero, 1.0), 2, dim, keepdim=keepdim)
    zero = zero if keepdim else torch.linalg.vector_norm(x.detach(), 2, dim) == 0
    return value.masked_fill(zero, 0.0)


def _tensor_norm(input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    if p in _EUCLIDEAN and dtype is None and input.is_floating_point():
        return _norm(input, dim, keepdim)
    other: Tensor = torch.norm(input, p, dim, keepdim, dtype=dtype)
    return other


def _torch_norm(
    input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> Tensor:
    if out is None:
        return _tensor_norm(input, p, dim, keepdim, dtype)
    other: Tensor = torch.norm(input, p, dim, keepdim, out=out, dtype=dtype)
    return other


def _vector_norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, **others: Any) -> Tensor:
    if ord == 2 and not any(value is not None for value in others.values()) and x.is_floating_point():
        return _norm(x, dim, keepdim)
    return torch.linalg.vector_norm(x, ord, dim, keepdim, **others)


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    if p == 2 and out is None and input.is_floating_point():
        return input / _norm(input, dim, True).clamp_min(eps)
    return F.normalize(input, p, dim, eps, out)


NORMS: dict[Any, Callable[..., Tensor]] = {
    Tensor.norm: _tensor_norm,
    torch.norm: _torch_norm,
    torch.linalg.vector_norm: _vector_norm,
    F.normalize: _normalize,
}
"""By the function of torch that each stands in for."""
