"""Joins model and loss into one module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gradconsist._inputs.batch import call
from gradconsist.types import Inputs, LossFunction


class ModelWithLoss(nn.Module):
    """Model and loss as one module, so that both see replaced parameters."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, inputs: Inputs, target: Tensor | None) -> tuple[Any, Any]:
        """Returns the model's output and its losses; the losses are None without a target."""
        output = call(self.model, inputs)
        return output, None if target is None else self.loss_fn(output, target)
