"""The term beside a model that is inside DistributedDataParallel, as semilearn has it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradconsist._consistency.gradient_buffer import with_gradient
from gradconsist._refusals.graphs import leaves_of
from gradconsist.errors import UnsupportedModuleError


def reduced_with(base: Tensor, total: Tensor, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """`base` plus the term, so that DistributedDataParallel meets the parameters that it expects and no other.

    It has seen the graph of its own forward alone, took the parameters outside of it as finished, and fails where one
    of them comes up in the backward: a layer whose output the network drops, for example. So the sum's graph leads to
    the parameters of `base` only; the others have no gradient of the term, or are refused.

    Args:
        base: the algorithm's loss.
        total: its value plus the weighted term, with the term's graph alone.
        parameters: the trainable parameters of the compared model by name.

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
                f"the parameter {name!r} gets a gradient from the term and none from the algorithm's own loss, and"
                " DistributedDataParallel would not reduce it: freeze it, or use one process."
            )
    used = [name for name in parameters if id(parameters[name]) in known]
    term = with_gradient(
        total.detach() - base.detach(), [gradients[name] for name in used], [parameters[name] for name in used]
    )
    return base + term
