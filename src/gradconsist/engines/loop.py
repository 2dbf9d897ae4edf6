"""The reference engine: one sample at a time, with `torch.autograd.grad` and ``create_graph=True``.

It is slow, but simple enough to check by reading. It runs every model that torch can differentiate twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradconsist._forward.batchnorm import STRONG, WEAK
from gradconsist._inputs.batch import take
from gradconsist.engines.base import Problem, inner
from gradconsist.errors import UnsupportedModuleError
from gradconsist.types import GradProducts, Inputs


@dataclass(frozen=True)
class LoopEngine:
    """Computes per-sample gradients in a loop over samples, as in algorithm 1 of the paper.

    Each sample is a batch of one. Time: 2 B forwards and backwards. Memory: the graphs of all pairs of a chunk, which
    is one pair with chunks of one pair and ``fused=True``.
    """

    projects: ClassVar[bool] = True
    gives_losses: ClassVar[bool] = True
    most_pairs: ClassVar[int] = 1  # larger chunks gain nothing here and keep more graphs alive

    def products(self, problem: Problem) -> GradProducts:
        """See `Engine.products`."""
        rows, losses = [], []
        for i in range(problem.target.shape[0]):
            one = slice(i, i + 1)
            target = problem.target[one]
            _, weak = _gradient(problem, take(problem.weak, one), target, WEAK, problem.graph_weak)
            loss, strong = _gradient(problem, take(problem.strong, one), target, STRONG, problem.graph_strong)
            losses.append(loss)
            if problem.projection is not None:
                weak, strong = (problem.projection.sketches([g.unsqueeze(0) for g in view]) for view in (weak, strong))
            rows.append(torch.stack([inner(weak, weak), inner(strong, strong), inner(weak, strong)]))
        products = GradProducts(*torch.stack(rows).unbind(1))
        return products._replace(losses=torch.stack(losses)) if problem.with_losses else products


def _gradient(problem: Problem, inputs: Inputs, target: Tensor, view: int, graph: bool) -> tuple[Tensor, list[Tensor]]:
    """Computes one sample's loss and its gradient, one tensor per parameter; zeros if it does not depend on it."""
    parameters = list(problem.parameters.values())
    with torch.enable_grad():
        loss = problem.losses(inputs, target, view=view).sum()
        # If the upstream gradient has no graph (a loss that is linear in the output), `once_differentiable` silently
        # cuts the graph. With this factor, it leaves the node that `check_second_derivative` looks for.
        one = _one(parameters[0]).to(loss.dtype) if graph else None
        # Not with materialize_grads, whose zeros are leaves that require grad.
        found = torch.autograd.grad(loss, parameters, one, create_graph=graph, allow_unused=True)
    gradient = [
        p.detach().new_zeros(p.shape) if part is None else part for p, part in zip(parameters, found, strict=True)
    ]
    return (loss, gradient) if graph else (loss.detach(), [part.detach() for part in gradient])


def _one(parameter: Tensor) -> Tensor:
    """Returns 1 with a graph and a derivative of 0, whatever the parameter holds."""
    return 1.0 + 0.0 * parameter.reshape(-1)[:1].sum().nan_to_num(0.0, 0.0, 0.0)


def refused_by_vmap(problem: Problem, error: RuntimeError) -> UnsupportedModuleError:
    """Builds the error for a model that fails under vmap but not in the per-sample loop.

    Args:
        problem: the pairs.
        error: what was raised under vmap.

    Returns:
        The error to raise.

    Raises:
        RuntimeError: the loop failed too, so the model is at fault; this is the loop's error.
    """
    LoopEngine().products(problem.take(torch.zeros(1, dtype=torch.long, device=problem.target.device)))
    return UnsupportedModuleError(
        f"vmap cannot run this model, the per-sample loop can: use `engine='loop'`. Torch said: {error}"
    )
