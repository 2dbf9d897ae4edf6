"""Checks that every use of a compared parameter is accounted for, and raises an error that names it if not.

A compared parameter enters the model in two ways only: as its stand-in, whose gradient is the per-sample gradient
whatever the model does with it, and inside a recorded use. Two things are left to check. Each recorded use that the
losses depend on must have the gradient of its output, and its inputs must not have changed since the call.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradconsist._refusals.graphs import nodes
from gradconsist.engines.ghost.record import Use
from gradconsist.errors import UnsupportedModuleError


def check_inputs(uses: Sequence[Use]) -> None:
    """Refuses a layer whose input was overwritten after the layer had used it."""
    for use in uses:
        if tuple(x._version for x in use.inputs) != use.versions:
            raise UnsupportedModuleError(
                f"the input of the layer with parameter {use.parameter!r} was overwritten by an in-place operation"
                " after the layer had used it: use the operation that returns a new tensor (inplace=False)."
            )


def check_coverage(losses: Tensor, uses: Sequence[Use], outputs: Sequence[Tensor | None]) -> None:
    """Refuses a use that the losses depend on but whose output got no gradient (None among `outputs`)."""
    silent = [use for use, d in zip(uses, outputs, strict=True) if d is None]
    if not silent:
        return
    reached = set(nodes(losses))
    for use in silent:
        if use.own in reached:
            raise UnsupportedModuleError(
                f"the output of the layer with parameter {use.parameter!r} was overwritten in a way that hides its"
                " gradient: use operations that return a new tensor (inplace=False), or `engine='loop'`."
            )
