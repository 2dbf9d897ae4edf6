"""Forms L_g and its gradient in the forward, chunk by chunk, with one buffer of the size of the parameters.

Each chunk's graph is differentiated and freed before the next one is built, so memory does not grow with the number of
pairs. Weights must be applied before the sum over samples: applied to the summed gradient they would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradconsist._forward.sparse import in_its_form
from gradconsist.errors import GradModeError


class GradientBuffer:
    """Sums up the values and parameter gradients of chunks.

    Args:
        aliases: views of the parameters, which the chunks use instead. Differentiating for the parameters themselves
            would run the user's tensor hooks twice, once here and once in the backward.
        through: other tensors that the chunks use and that depend on the parameters.
    """

    def __init__(self, aliases: Sequence[Tensor], through: Sequence[Tensor] = ()) -> None:
        self._own = len(aliases)
        self._sources = [*aliases, *through]
        self._gradients: list[Tensor | None] = [None] * len(self._sources)
        self._sums: set[int] = set()  # places in `_gradients` of tensors that nobody else holds
        self._value: Tensor | None = None

    def add(self, loss: Tensor, amplification: float = 1.0) -> None:
        """Adds one chunk's loss and gradient, and frees its graph.

        The loss is multiplied by `amplification` during differentiation, a power of two, so that float16 does not
        underflow on the way; it is reduced if it would overflow.
        """
        parts: Sequence[Tensor | None] = [None] * len(self._sources)
        if loss.requires_grad:  # else the gradients are constant, as for a linear model with a linear loss
            parts = self._differentiate(loss, amplification)
        # Added last, so that a chunk that failed (out of memory, say) can be tried again.
        self._value = loss.detach() if self._value is None else self._value + loss.detach()
        self._accumulate(parts)

    def add_through(self, values: Sequence[Tensor]) -> None:
        """Adds the part of the gradient through `through`, by the chain rule: `values` is `through` with its graph."""
        parts = self._gradients[self._own :]
        known = [(v, part) for v, part in zip(values, parts, strict=True) if part is not None and v.requires_grad]
        if known:
            outputs, cotangents = zip(*known, strict=True)
            found = torch.autograd.grad(outputs, self._sources[: self._own], cotangents, allow_unused=True)
            self._accumulate(found)

    def _accumulate(self, parts: Sequence[Tensor | None]) -> None:
        for position, part in enumerate(parts):
            total = self._gradients[position]
            if part is None:
                continue
            if total is None:
                self._gradients[position] = part.detach()
            elif position in self._sums:
                total.add_(part)
            else:  # autograd may give several parameters the same memory: those of a + b, or of cat([a, x]) + b
                self._gradients[position] = total + part
                self._sums.add(position)

    def _differentiate(self, loss: Tensor, amplification: float) -> Sequence[Tensor | None]:
        if amplification == 1.0:
            return torch.autograd.grad(loss, self._sources, allow_unused=True)
        for factor in (amplification / 2.0 ** (5 * attempt) for attempt in range(8)):
            parts = torch.autograd.grad(factor * loss, self._sources, allow_unused=True, retain_graph=True)
            if all(part is None or bool(torch.isfinite(part).all()) for part in parts):
                break
        return [None if part is None else part / factor for part in parts]

    def attach(self, parameters: Mapping[str, Tensor], sparse: Container[str] = ()) -> Tensor:
        """Returns the value as a scalar whose backward gives the buffered gradient, scaled, to the parameters.

        They come in the order of the aliases, those named in `sparse` with a sparse gradient. A parameter that no chunk
        depends on gets none, as in an ordinary backward.
        """
        found = zip(parameters, self._gradients[: self._own], strict=True)
        gradients = [None if part is None else in_its_form(part, name in sparse) for name, part in found]
        return with_gradient(self._value, gradients, list(parameters.values()))


def zero(parameters: Mapping[str, Tensor], sparse: Container[str] = ()) -> Tensor:
    """Returns the scalar 0, with a derivative of 0 for each of the parameters."""
    zeros = [in_its_form(torch.zeros_like(parameter), name in sparse) for name, parameter in parameters.items()]
    return with_gradient(None, zeros, list(parameters.values()))


def with_gradient(value: Tensor | None, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Returns `value` (0 if None) as a scalar whose derivative for `parameters` is `gradients`."""
    result: Tensor = _GradientInForward.apply(value, list(gradients), *parameters)
    return result


class _GradientInForward(torch.autograd.Function):
    """Identity on the value, whose derivative for the parameters is the buffer."""

    @staticmethod
    def forward(ctx: Any, value: Tensor | None, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        # Saved like the tensors of any graph: a backward frees the buffer, and a second one raises unless the first
        # kept the graph. The parameters are not saved: their values are not used, and saving them would forbid an
        # optimizer step before the backward.
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
    """Multiplies the buffer by the upstream gradient; raises an error if the result is differentiated again.

    `once_differentiable` would raise only if the upstream gradient has a graph. Next to another term of the same loss,
    whose gradient has a graph, the missing part would be read as zero. If `nothing` was compared, it is zero.
    """

    @staticmethod
    def forward(
        ctx: Any, upstream: Tensor, gradients: list[Tensor | None], nothing: bool, *parameters: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.nothing = nothing
        scaled: list[Tensor | None] = [None] * len(gradients)
        alike: dict[tuple[torch.dtype, bool], dict[int, Tensor]] = {}
        for place, part in enumerate(gradients):
            if part is not None:
                alike.setdefault((part.dtype, part.is_sparse), {})[place] = part
        for (dtype, sparse), parts in alike.items():
            own, factor = list(parts.values()), upstream.to(dtype)
            products = [factor * part for part in own] if sparse else torch._foreach_mul(own, factor)
            for place, product in zip(parts, products, strict=True):
                scaled[place] = product
        return tuple(scaled)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.nothing:
            return (None, None, None, *(None for _ in cotangents))
        raise GradModeError(
            "the gradient of L_g was differentiated once more, but `fused=True` has formed it as a constant: pass"
            " `fused=False` to GradientConsistencyLoss, which keeps the graph."
        )
