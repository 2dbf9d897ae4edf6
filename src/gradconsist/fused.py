"""Gradient in the forward: L_g and its parameter gradient, chunk by chunk, with one parameter-sized buffer.

Each chunk's graph is differentiated and freed before the next one is built, so that memory does not grow with the
number of pairs. Weights enter before the sum over samples: applied to the summed gradient they would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GradientBuffer:
    """The sum of the chunks' values and parameter gradients.

    Args:
        parameters: what to differentiate for.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.value: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Adds one chunk's loss and gradient, and frees its graph."""
        value = loss.detach()
        self.value = value if self.value is None else self.value + value
        if not loss.requires_grad:  # constant gradients, as of a linear model with a linear loss
            return
        parts = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for total, part in zip(self.gradients, parts, strict=True):
            if part is not None:
                total += part

    def attach(self, zero: Tensor) -> Tensor:
        """The value as a tensor whose backward hands the buffered gradient, scaled, to autograd.

        Args:
            zero: value and dtype if no chunk was added.

        Returns:
            Scalar tensor that requires grad.
        """
        value = zero if self.value is None else self.value
        result: Tensor = _GradientInForward.apply(value, self.gradients, *self.parameters)
        return result


class _GradientInForward(torch.autograd.Function):
    """Identity on the value; its derivative for the parameters is the buffer, known beforehand."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The buffer is a constant: a derivative of it (a third one of the model) must raise, not read as zero.
        return (None, None, *(upstream.to(part.dtype) * part for part in ctx.gradients))
