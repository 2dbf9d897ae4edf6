"""Tolerances of the contract, and the two errors that are held against them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .oracle import Verdict

#: (cosine, absolute; parameter gradient, relative in norm over the whole vector). In float32 a deep ReLU network may go
#: beyond: rounding moves some activation over its kink, in any engine (benchmarks/evidence/float32_error.py).
TOLERANCE = {torch.float64: (1e-10, 1e-8), torch.float32: (2e-5, 2e-4)}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradient_of(loss: Tensor, model: nn.Module, cotangent: Tensor | None = None) -> Tensor:
    """dL_g/dtheta by `backward`, as one float64 vector; `.grad` is left as it was found (None)."""
    assert all(p.grad is None for p in model.parameters()), "start from a model without gradients"
    loss.backward(cotangent)
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).double() for p in trainable(model)]
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def relative(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|, in float64."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))


def worst(values: Iterable[float]) -> float:
    return max(values, default=0.0)


def cosine_error(cosine: Tensor, reference: Tensor) -> float:
    """Largest difference; infinite where one is NaN and the other is not."""
    cosine, reference = cosine.detach().double(), reference.double()
    if not torch.equal(cosine.isnan(), reference.isnan()):
        return float("inf")
    return float((cosine - reference).abs().nan_to_num(0.0).max())


def assert_agrees(record: Any, loss: Tensor, gradient: Tensor, verdict: Verdict, *, dtype: torch.dtype) -> None:
    """Cosine, norms, loss and parameter gradient of one call against the oracle's."""
    cos_tol, grad_tol = TOLERANCE[dtype]
    assert torch.equal(record.degenerate, verdict.degenerate)
    assert cosine_error(record.cosine, verdict.cosine) <= cos_tol
    assert relative(record.norm_weak, verdict.norm_weak) <= grad_tol
    assert relative(record.norm_strong, verdict.norm_strong) <= grad_tol
    scale = float(verdict.loss.abs().sum()) + 1.0
    assert float((loss.detach().double() - verdict.loss).abs().max()) <= 2 * cos_tol * scale
    assert relative(gradient, verdict.flat) <= grad_tol


def assert_exact(gc: Any, arguments: Any, verdict: Verdict) -> None:
    """One call of a loss, and its gradient, against the oracle's, in the precision of the model's parameters."""
    loss = gc(*arguments)
    gradient = gradient_of(loss, gc.model)
    assert_agrees(gc.last, loss, gradient, verdict, dtype=next(gc.model.parameters()).dtype)


def assert_measures(record: Any, verdict: Verdict) -> None:
    """Cosine and norms of a record in float64 against the oracle's."""
    assert cosine_error(record.cosine, verdict.cosine) <= 1e-10
    assert relative(record.norm_weak, verdict.norm_weak) <= 1e-10
    assert relative(record.norm_strong, verdict.norm_strong) <= 1e-10
