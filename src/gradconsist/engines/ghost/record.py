"""Records the calls of operators with compared parameters in a forward, and runs code below vmap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradconsist.engines.ghost.rules import Rule

Compute = Callable[..., Any]


@dataclass(frozen=True)
class Use:
    """One call of an operator with a compared parameter.

    Attributes:
        parameter: name of the parameter.
        rule: computes the parameter's gradient from input and output gradient.
        inputs: inputs of the operator, [N, ...] each; empty if the rule needs none.
        versions: version counters of the inputs, to detect that one was overwritten.
        output: gradient edge of the output.
        own: autograd node of the parameter's alias, which only this use has.
    """

    parameter: str
    rule: Rule
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    output: GradientEdge
    own: Any

    @property
    def input(self) -> Tensor | None:
        """The first input, or None."""
        return self.inputs[0] if self.inputs else None


class _Below(torch.autograd.Function):
    """Runs `compute(samples, per_sample, *tensors)` below vmap, on plain tensors.

    A tensor with one row per sample comes with the samples in dimension 0 and ``True`` in `per_sample`; other tensors
    come unchanged.
    """

    @staticmethod
    def forward(compute: Compute, *tensors: Tensor) -> Any:
        raise RuntimeError("no tensor has one row per sample: an anchor should have been among the arguments")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        del ctx, inputs, output

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], compute: Compute, *tensors: Tensor) -> tuple[Any, Any]:
        dims = in_dims[1:]
        moved = [tensor if dim is None else tensor.movedim(dim, 0) for tensor, dim in zip(tensors, dims, strict=True)]
        result = compute(info.batch_size, [dim is not None for dim in dims], *moved)
        return result, (0,) * len(result) if isinstance(result, tuple) else 0


class Record:
    """Collects the uses of compared parameters in one forward.

    Args:
        parameters: the compared parameters (E) and their names.
        stand_ins: their replacements in the model, with the same names and one row per sample.
    """

    def __init__(self, parameters: Mapping[str, Tensor], stand_ins: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self._names = {id(stand_in): name for name, stand_in in stand_ins.items()}
        self._parameters = parameters
        self._anchor = next(iter(stand_ins.values()))  # any tensor with one row per sample

    def _own(self, tensor: Any) -> tuple[str | None, Tensor | None]:
        """Returns name and parameter of a stand-in, or None twice. A new alias identifies this use of the parameter."""
        name = self._names.get(id(tensor))
        return name, None if name is None else self._parameters[name].view_as(self._parameters[name])

    def _note(self, name: str | None, alias: Tensor | None, rule: Rule, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        if name is None or alias is None or not torch.is_grad_enabled():  # not compared, or constant
            return
        if not y.requires_grad:
            raise RuntimeError("a compared parameter is used inside another transform of torch.func")
        versions = tuple(x._version for x in inputs)
        self.uses.append(Use(name, rule, inputs, versions, get_gradient_edge(y), alias.grad_fn))

    def _below(self, compute: Compute, *tensors: Tensor) -> Any:
        """Runs `compute(samples, per_sample, *tensors)` on plain tensors."""
        result = _Below.apply(lambda n, flags, *plain: compute(n, flags, *plain[:-1]), *tensors, self._anchor)
        return result


def rows(tensor: Tensor, per_sample: bool, count: int) -> Tensor:
    """Returns `tensor` with one row per sample."""
    return tensor if per_sample else tensor.expand(count, *tensor.shape)
