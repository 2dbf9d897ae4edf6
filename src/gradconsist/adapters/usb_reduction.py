"""Adds the term to the loss of a model inside DistributedDataParallel, as semilearn uses it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradconsist._consistency.gradient_buffer import with_gradient
from gradconsist._refusals.graphs import leaves_of
from gradconsist.errors import UnsupportedModuleError


def reduced_with(base: Tensor, total: Tensor, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Adds the term to `base` so that only the parameters that DistributedDataParallel expects get a gradient.

    DistributedDataParallel has seen only the graph of its forward and marked all parameters outside that graph as
    ready. It fails if one of them then appears in the backward, for example that of a layer whose output the network
    drops. So the graph of the sum leads only to the parameters of `base`. If another parameter gets a nonzero gradient
    from the term, you get an error.

    Args:
        base: the algorithm's loss.
        total: its value plus the weighted term, with the graph of the term only.
        parameters: the trainable parameters of the compared model, with their names as keys.

    Returns:
        The scalar that the algorithm differentiates.

    Raises:
        UnsupportedModuleError: the term depends on a parameter that `base` does not depend on.
    """
    known = leaves_of(base)
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    gradients = dict(zip(parameters, found, strict=True))
    for name, gradient in gradients.items():
        if id(parameters[name]) not in known and gradient is not None and bool(gradient.any()):
            raise UnsupportedModuleError(
                f"the parameter {name!r} gets a gradient from the term and none from the algorithm's own loss, so"
                " DistributedDataParallel would not reduce it: freeze it, or use one process."
            )
    used = [name for name in parameters if id(parameters[name]) in known]
    term = with_gradient(
        total.detach() - base.detach(), [gradients[name] for name in used], [parameters[name] for name in used]
    )
    return base + term
