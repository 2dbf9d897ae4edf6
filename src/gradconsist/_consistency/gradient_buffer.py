"""Gradient in the forward: L_g and its parameter gradient, chunk by chunk, with one parameter-sized buffer.

Each chunk's graph is differentiated and freed before the next one is built, so that memory does not grow with the
number of pairs. Weights enter before the sum over samples: applied to the summed gradient they would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradconsist._forward.sparse import in_its_form
from gradconsist.errors import GradModeError


class GradientBuffer:
    """The sum of the chunks' values and parameter gradients.

    Args:
        aliases: views of the parameters, which the chunks use in their place. Differentiating for the parameters
            themselves would run the user's tensor hooks, once here and once in the backward.
        through: other tensors that the chunks use and that depend on the parameters.
    """

    def __init__(self, aliases: Sequence[Tensor], through: Sequence[Tensor] = ()) -> None:
        self._own = len(aliases)
        self._sources = [*aliases, *through]
        self._gradients: list[Tensor | None] = [None] * len(self._sources)
        self._value: Tensor | None = None

    def add(self, loss: Tensor, amplification: float = 1.0) -> None:
        """Adds one chunk's loss and gradient, and frees its graph.

        Args:
            loss: of the chunk.
            amplification: a power of two by which the loss is multiplied while it is differentiated, so that float16
                in between does not underflow; less where it would overflow.
        """
        parts: Sequence[Tensor | None] = [None] * len(self._sources)
        if loss.requires_grad:  # else the gradients are constant, as of a linear model with a linear loss
            parts = self._differentiate(loss, amplification)
        # Only now, so that a chunk that failed (out of memory, say) can be tried again.
        self._value = loss.detach() if self._value is None else self._value + loss.detach()
        self._accumulate(parts)

    def add_through(self, values: Sequence[Tensor]) -> None:
        """Adds what the gradient owes to the tensors in `through`: the chain rule's other half.

        Args:
            values: the same tensors with their graph down to the aliases; without one, where none of them is behind.
        """
        parts = self._gradients[self._own :]
        known = [(v, part) for v, part in zip(values, parts, strict=True) if part is not None and v.requires_grad]
        if known:
            outputs, cotangents = zip(*known, strict=True)
            found = torch.autograd.grad(outputs, self._sources[: self._own], cotangents, allow_unused=True)
            self._accumulate(found)

    def _accumulate(self, parts: Sequence[Tensor | None]) -> None:
        for position, part in enumerate(parts):
            total = self._gradients[position]
            if part is not None:
                self._gradients[position] = part.detach() if total is None else total.add_(part)

    def _differentiate(self, loss: Tensor, amplification: float) -> Sequence[Tensor | None]:
        if amplification == 1.0:
            return torch.autograd.grad(loss, self._sources, allow_unused=True)
        for factor in (amplification / 2.0 ** (5 * attempt) for attempt in range(8)):
            parts = torch.autograd.grad(factor * loss, self._sources, allow_unused=True, retain_graph=True)
            if all(part is None or bool(torch.isfinite(part).all()) for part in parts):
                break
        return [None if part is None else part / factor for part in parts]

    def attach(self, parameters: Mapping[str, Tensor], sparse: Container[str] = ()) -> Tensor:
        """The value as a tensor whose backward hands the buffered gradient, scaled, to the parameters.

        Args:
            parameters: the named parameters, in the order of the aliases. One that no chunk depends on gets no
                gradient, as in an ordinary backward.
            sparse: names of those whose gradient is handed over in sparse form.

        Returns:
            Scalar tensor that requires grad.
        """
        found = zip(parameters, self._gradients[: self._own], strict=True)
        gradients = [None if part is None else in_its_form(part, name in sparse) for name, part in found]
        return with_gradient(self._value, gradients, list(parameters.values()))


def zero(parameters: Mapping[str, Tensor], sparse: Container[str] = ()) -> Tensor:
    """0 as a scalar with a derivative of 0 for each of the parameters."""
    zeros = [in_its_form(torch.zeros_like(parameter), name in sparse) for name, parameter in parameters.items()]
    return with_gradient(None, zeros, list(parameters.values()))


def with_gradient(value: Tensor | None, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """`value` (None is 0) as a scalar whose derivative for `parameters` is `gradients` (None is none)."""
    result: Tensor = _GradientInForward.apply(value, list(gradients), *parameters)
    return result


class _GradientInForward(torch.autograd.Function):
    """Identity on the value; its derivative for the parameters is the buffer, known beforehand."""

    @staticmethod
    def forward(ctx: Any, value: Tensor | None, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        # Saved as any graph saves what it needs: a backward frees the buffer, and a second one raises, unless the first
        # kept the graph. The parameters are not saved, which would forbid an optimizer step before the backward: their
        # values are not used.
        own = [part for part in gradients if part is not None]
        ctx.save_for_backward(*(own or [parameters[0].new_empty(0)]))
        ctx.present, ctx.parameters, ctx.nothing = [part is not None for part in gradients], parameters, value is None
        return parameters[0].new_zeros([]) if value is None else value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        gradients = [next(saved) if present else None for present in ctx.present]
        return (None, None, *_Scaled.apply(upstream, gradients, ctx.nothing, *ctx.parameters))


class _Scaled(torch.autograd.Function):
    """The buffer times the upstream gradient; a constant in the parameters, which says so when it is differentiated.

    `once_differentiable` would do so only where the upstream gradient has a graph. Beside another term of the same
    loss, whose gradient has one, the missing part would read as zero. Where `nothing` was compared it is zero.
    """

    @staticmethod
    def forward(
        ctx: Any, upstream: Tensor, gradients: list[Tensor | None], nothing: bool, *parameters: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.nothing = nothing
        return tuple(None if part is None else upstream.to(part.dtype) * part for part in gradients)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.nothing:
            return (None, None, None, *(None for _ in cotangents))
        raise GradModeError(
            "the gradient of L_g was differentiated once more, and `fused=True` has formed it as a constant: pass"
            " `fused=False` to GradientConsistencyLoss, which keeps the graph."
        )
