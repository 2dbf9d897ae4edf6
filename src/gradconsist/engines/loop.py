"""The reference engine: one sample at a time, by `torch.autograd.grad` with ``create_graph=True``.

Slow, and plain enough to be believed. It runs whatever torch can differentiate twice.
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
    """Per-sample gradients by a loop over samples, as algorithm 1 of the paper writes them.

    Each sample is a batch of one. Time: 2 B forwards and backwards; memory: the graphs of all pairs that are alive,
    which with chunks of one pair and the fused backward is one.
    """

    projects: ClassVar[bool] = True

    def products(self, problem: Problem) -> GradProducts:
        """See `Engine.products`."""
        rows = []
        for i in range(problem.target.shape[0]):
            one = slice(i, i + 1)
            target = problem.target[one]
            weak = _gradient(problem, take(problem.weak, one), target, WEAK, problem.graph_weak)
            strong = _gradient(problem, take(problem.strong, one), target, STRONG, problem.graph_strong)
            if problem.projection is not None:
                weak, strong = (problem.projection.sketches([g.unsqueeze(0) for g in view]) for view in (weak, strong))
            rows.append(torch.stack([inner(weak, weak), inner(strong, strong), inner(weak, strong)]))
        return GradProducts(*torch.stack(rows).unbind(1))

    def preferred_chunk(self, problem: Problem) -> int:
        """One pair: more at a time gain nothing here and keep more graphs alive."""
        del problem
        return 1


def _gradient(problem: Problem, inputs: Inputs, target: Tensor, view: int, graph: bool) -> list[Tensor]:
    """The gradient of one sample's loss, one tensor a parameter; zeros where the loss does not depend on it."""
    parameters = list(problem.parameters.values())
    with torch.enable_grad():
        loss = problem.losses(inputs, target, view=view).sum()
        # Where nothing that comes from above has a graph (a loss that is linear in the output), `once_differentiable`
        # cuts it without a word; above this one it leaves the node that `check_second_derivative` looks for.
        one = _one(parameters[0]).to(loss.dtype) if graph else None
        # Not materialize_grads: its zeros are leaves that require grad.
        found = torch.autograd.grad(loss, parameters, one, create_graph=graph, allow_unused=True)
    gradient = [
        p.detach().new_zeros(p.shape) if part is None else part for p, part in zip(parameters, found, strict=True)
    ]
    return gradient if graph else [part.detach() for part in gradient]


def _one(parameter: Tensor) -> Tensor:
    """1 with a graph, and a derivative of 0, whatever the parameter holds."""
    return 1.0 + 0.0 * parameter.reshape(-1)[:1].sum().nan_to_num(0.0, 0.0, 0.0)


def refused_by_vmap(problem: Problem, error: RuntimeError) -> UnsupportedModuleError:
    """The refusal for a model that fails under vmap and not in the per-sample loop.

    Args:
        problem: the pairs.
        error: what was raised under vmap.

    Returns:
        The refusal.

    Raises:
        RuntimeError: the loop's own error, if it fails too: then it is the model's.
    """
    LoopEngine().products(problem.take(torch.zeros(1, dtype=torch.long, device=problem.target.device)))
    return UnsupportedModuleError(
        f"vmap cannot run this model, the per-sample loop can: use `engine='loop'`. Torch said: {error}"
    )
