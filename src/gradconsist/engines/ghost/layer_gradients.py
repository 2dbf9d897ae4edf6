"""Runs one batched forward and differentiates it for the outputs of its layers."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from gradconsist._inputs.batch import leaves, rebuilt
from gradconsist.engines.base import Problem
from gradconsist.engines.conditions import Conditions
from gradconsist.engines.ghost.capture import Capture
from gradconsist.engines.ghost.conv import Stage
from gradconsist.engines.ghost.coverage import check_coverage, check_inputs
from gradconsist.engines.ghost.record import Use
from gradconsist.engines.ghost.registered import intercepted
from gradconsist.types import Inputs


@dataclass(frozen=True)
class Seen:
    """Results of one forward of N samples, differentiated for the outputs of its layers.

    Attributes:
        uses: every call of an operator with a rule whose output the losses depend on.
        outputs: for each use the gradient of its output.
        rows: per-sample gradients [N, *shape] through everything else, by parameter; only for parameters that have one.
        losses: the losses, [N].
    """

    uses: list[Use]
    outputs: list[Tensor]
    rows: dict[str, Tensor]
    losses: Tensor

    def of(self, name: str) -> list[tuple[Use, Tensor]]:
        """Returns the uses of one parameter, with the gradients of their outputs."""
        return [(use, d) for use, d in zip(self.uses, self.outputs, strict=True) if use.parameter == name]

    def gradient(self, name: str) -> Tensor | None:
        """Sums the per-sample gradients [N, *shape] of one parameter over its uses; None if the losses ignore it."""
        parts = [use.rule.gradients(use.input, d) for use, d in self.of(name)]
        parts += [self.rows[name]] if name in self.rows else []
        if not parts:
            return None
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        return torch.stack([part.to(wide) for part in parts]).sum(0) if len(parts) > 1 else parts[0]


def see(
    problem: Problem,
    inputs: Inputs,
    target: Tensor,
    view: Tensor,
    graph: bool,
    looped: Container[str] = (),
) -> Seen:
    """Runs one forward, and one backward to the outputs of layers, for a batch of N samples.

    Args:
        problem: losses and compared parameters.
        inputs: N samples.
        target: their targets.
        view: the view of each sample, [N].
        graph: whether the result must be differentiable.
        looped: paths of modules that run sample by sample.
    """
    is_tensor = isinstance(inputs, Tensor)
    columns = leaves(inputs)
    uses: list[Use] = []
    stage = Stage(outputs_only=True)

    def loss(stand_ins: Mapping[str, Tensor], target: Tensor, view: Tensor, *sample: Tensor) -> Tensor:
        batched = [leaf.unsqueeze(0) for leaf in sample]
        one: Inputs = batched[0] if is_tensor else rebuilt(inputs, batched)
        capture = Capture(problem.parameters, stand_ins, stage)
        if not problem.random:  # a group that runs again draws other numbers, which would favour some answers
            capture.replacements |= Conditions(view).replacements
        try:
            with intercepted(problem.model, capture.layer, capture.one_by_one, looped), capture:
                result = problem.losses(one, target.unsqueeze(0), stand_ins, view).squeeze(0)
            uses.extend(capture.uses)
        finally:
            capture.release()
        return result

    in_dims = (0, 0, 0, *[0] * len(columns))
    with torch.enable_grad():
        stand_ins = {name: p.expand(len(target), *p.shape) for name, p in problem.parameters.items()}
        batched = vmap(loss, in_dims=in_dims, randomness="different" if problem.random else "error")
        losses = batched(stand_ins, target, view, *columns)
        wanted: list[Any] = [*(use.output for use in uses), *stand_ins.values()]
        # The sum rather than the mean, so that each output gradient is that of the sample's loss.
        found = torch.autograd.grad(losses.sum(), wanted, create_graph=graph, allow_unused=True)
    stage.outputs_only = False
    outputs, rows = found[: len(uses)], dict(zip(stand_ins, found[len(uses) :], strict=True))
    check_inputs(uses)
    check_coverage(losses, uses, outputs)
    seen = Seen(
        [use for use, d in zip(uses, outputs, strict=True) if d is not None],
        [d for d in outputs if d is not None],
        {name: row for name, row in rows.items() if row is not None},
        losses if problem.with_losses else losses.detach(),  # nobody else needs their graph
    )
    return seen if graph else _constant(seen)


def _constant(seen: Seen) -> Seen:
    uses = [replace(use, rule=use.rule.constant(), inputs=tuple(x.detach() for x in use.inputs)) for use in seen.uses]
    outputs, rows = [d.detach() for d in seen.outputs], {name: row.detach() for name, row in seen.rows.items()}
    return Seen(uses, outputs, rows, seen.losses.detach())
