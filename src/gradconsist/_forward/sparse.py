"""Gives embeddings made with ``sparse=True`` sparse gradients, as torch does.

Inside a comparison the gradient of an embedding is dense, because inner products of sparse gradients cannot be
differentiated. The parameter gets a sparse gradient again, since `torch.optim.SparseAdam` takes nothing else.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def sparse_parameters(model: nn.Module) -> set[str]:
    """Returns the first names of parameters that are weights of ``nn.Embedding(sparse=True)`` and nothing else.

    In torch, a tied weight has a dense gradient as soon as one of its uses has.
    """
    only: dict[int, bool] = {}
    for module in model.modules():
        embeds = isinstance(module, nn.Embedding) and module.sparse
        for key, parameter in module._parameters.items():
            only[id(parameter)] = only.get(id(parameter), True) and embeds and key == "weight"
    return {name for name, parameter in model.named_parameters() if only[id(parameter)]}


def in_its_form(gradient: Tensor, sparse: bool) -> Tensor:
    """Returns `gradient` [rows, width], or if `sparse` its nonzero rows as a coalesced COO tensor."""
    return gradient.to_sparse(1) if sparse else gradient


def aliases(parameters: Mapping[str, Tensor], sparse: Container[str]) -> dict[str, Tensor]:
    """Makes views of the parameters, with a graph, that pass on gradients in dense or sparse form.

    The names in `sparse` are read in the backward, since a use that makes a gradient dense may be found after the views
    were made.
    """
    with torch.enable_grad():
        views: dict[str, Tensor] = {
            name: _Alias.apply(parameter, name, sparse) if name in sparse else parameter.view_as(parameter)
            for name, parameter in parameters.items()
        }
    return views


class _Alias(torch.autograd.Function):
    """A view that passes its gradient on in sparse form; can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, name: str, sparse: Container[str]) -> Tensor:
        ctx.own, ctx.all = name, sparse  # not ctx.name, which is the node's method
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return in_its_form(gradient, ctx.own in ctx.all), None, None
