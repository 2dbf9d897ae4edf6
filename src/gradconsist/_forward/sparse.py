"""Gradients of embeddings made with ``sparse=True``, in the form that torch's own have.

Inside a comparison the gradient of an embedding is dense, because a sparse one has no inner products that can be
differentiated. What reaches the parameter is sparse again: `torch.optim.SparseAdam` takes nothing else.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def sparse_parameters(model: nn.Module) -> set[str]:
    """First names of the parameters that are weights of ``nn.Embedding(sparse=True)`` and of nothing else.

    Args:
        model: the model. A tied weight has a dense gradient in torch as soon as one of its uses has.

    Returns:
        Names as in ``model.named_parameters()``.
    """
    only: dict[int, bool] = {}
    for module in model.modules():
        embeds = isinstance(module, nn.Embedding) and module.sparse
        for key, parameter in module._parameters.items():
            only[id(parameter)] = only.get(id(parameter), True) and embeds and key == "weight"
    return {name for name, parameter in model.named_parameters() if only[id(parameter)]}


def in_its_form(gradient: Tensor, sparse: bool) -> Tensor:
    """`gradient` [rows, width], or if `sparse` its rows that are not zero, as a coalesced COO tensor."""
    return gradient.to_sparse(1) if sparse else gradient


def aliases(parameters: Mapping[str, Tensor], sparse: Container[str]) -> dict[str, Tensor]:
    """Views of the parameters with a graph, which send a gradient on in the parameter's own form.

    Args:
        parameters: each with its name.
        sparse: names of those whose gradient is sparse; looked at in the backward, since a use that makes a gradient
            dense may be found after the views were made.

    Returns:
        The views, with the same names.
    """
    with torch.enable_grad():
        views: dict[str, Tensor] = {
            name: _Alias.apply(parameter, name, sparse) if name in sparse else parameter.view_as(parameter)
            for name, parameter in parameters.items()
        }
    return views


class _Alias(torch.autograd.Function):
    """A view whose gradient is handed on in sparse form; differentiable again."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, name: str, sparse: Container[str]) -> Tensor:
        ctx.own, ctx.all = name, sparse  # not ctx.name, which is the node's method
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return in_its_form(gradient, ctx.own in ctx.all), None, None
