"""Random projections: inner products of short sketches instead of whole gradients.

`RandomProjection` is the user's option, and `Projector` holds the matrices of one call. An engine passes per-sample
gradients to the projector, or the two factors of a layer's gradient before it is formed, and takes the inner products
of the result.

Index letters: N samples, k = dim, [n, m] a weight read as a matrix, P entries of E.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from gradconsist._inputs.options import check_choice, check_count
from gradconsist._inputs.precision import wide
from gradconsist.errors import ConfigError

Kind: TypeAlias = Literal["kronecker", "gaussian"]
KINDS = ("kronecker", "gaussian")
_REMOVED = ("rademacher", "sparse")

_BLOCK = 2**22  # entries of a projection matrix in memory at a time


@dataclass(frozen=True)
class RandomProjection:
    """Compares P g_w with P g_s instead of g_w with g_s, for a random matrix P with E[PᵀP] = I.

    **What it gives.** Inner products without bias: for constant a and b, and P independent of them,

        E⟨Pa, Pb⟩ = aᵀ E[PᵀP] b = ⟨a, b⟩

    So the three products of a pair are right on average over P. Both views use the same P, so identical views have
    cosine 1.

    **What it does not give.** The cosine is a ratio of products, so it is biased: for a dense P of k rows,
    E[cos] = cos - cos (1 - cos²) / (2k) + O(1/k²), as for a correlation coefficient of k numbers, with a standard
    deviation of about (1 - cos²) / sqrt(k). L_g and its gradient are biased to the same order. `max_pairs` and the
    wrapper's `every` have no such bias. The norms in the record, which `min_norm` bounds, are those of the sketches.

    The kinds differ in P and in cost:

    - "kronecker": weights with two dimensions or more are read as matrices [n, m] = [first, all others]. If
      k < min(n, m), the gradient G is replaced by S = L G Rᵀ [k, k] with independent entries ±1/sqrt(k) in L [k, n]
      and R [k, m]; E⟨L A Rᵀ, L B Rᵀ⟩ = tr(E[LᵀL] A E[RᵀR] Bᵀ) = ⟨A, B⟩. All other parameters (biases, scales of
      norms, narrow weights) stay exact, and the products of parameters add up. Since G = Σ_t d_t a_tᵀ over positions
      t, S = Σ_t (L d_t)(R a_t)ᵀ. So `GhostEngine` projects inputs and output gradients of linear layers, convolutions
      of all kinds and embeddings, and never forms G. Var |S|² <= (4/k + 2/k²) |GGᵀ|² + (2/k²) |G|⁴. That is about 4/k
      of |G|⁴ if G has rank one, and goes towards 2/k² for high rank, since |GGᵀ|² >= |G|⁴ / rank.
    - "gaussian": k rows of independent normal numbers of variance 1/k. Var⟨Pa, Pb⟩ = (|a|²|b|² + ⟨a, b⟩²) / k. It
      needs the per-sample gradient first and adds to its cost, so it is never faster than the exact products. Use it
      as a reference.

    docs/guides/cost.md has measurements. P depends only on the seed, the number of the draw and the parameter's
    position. It is the same in every engine, chunk and device, and in every process that has made as many calls.

    Args:
        dim: k, the number of rows of P, or of each factor. A "kronecker" projection with k >= min(n, m) for every
            weight is exact.
        kind: kind of matrix.
        seed: seed of the matrices, in [0, 2^63).
        resample_every: draw new matrices after so many calls of the loss; 0 or None keeps the first ones. The number of
            calls is in the loss's ``state_dict()``, so a resumed run continues with the same matrices. `measure` uses
            the current ones and does not count.

    Raises:
        ConfigError: an option has an invalid value.

    Example:
        >>> projection = RandomProjection(3, "gaussian", seed=1)
        >>> p = projection.matrix([(2, 2), (2,)])
        >>> p.shape, torch.equal(p, projection.matrix([(2, 2), (2,)]))
        (torch.Size([3, 6]), True)

    Source: Johnson and Lindenstrauss (1984); Achlioptas (2003) for signs; factors of layers as in LoGra (Choe et al.,
    2024).
    """

    dim: int
    kind: Kind = "kronecker"
    seed: int = field(default=0, kw_only=True)
    resample_every: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_count("dim", self.dim)
        if self.kind in _REMOVED:
            raise ConfigError(
                f"`kind` is {self.kind!r}, which was removed: it forms the per-sample gradients first, so it cost more"
                " than the exact term. Use 'kronecker', which never forms them, or 'gaussian', the reference."
            )
        check_choice("kind", self.kind, KINDS)
        check_count("seed", self.seed, least=0, most=2**63 - 1)
        if self.resample_every is not None:
            check_count("resample_every", self.resample_every, least=0)

    def projector(self, call: int = 0) -> Projector:
        """Returns the matrices of a call.

        Args:
            call: number of calls before it.

        Returns:
            The projector that engines use.
        """
        draw = call // self.resample_every if self.resample_every else 0
        return Projector(self.kind, self.dim, (self.seed, draw))

    def matrix(self, shapes: Sequence[Sequence[int]], *, call: int = 0) -> Tensor:
        """Returns P as one matrix, for inspection and tests; it is large except for small models.

        Args:
            shapes: shapes of the compared parameters, in the model's order. P multiplies their gradients, flattened and
                concatenated.
            call: as in `projector`.

        Returns:
            float64 [rows, P]: k rows for "gaussian"; for "kronecker" the blocks L ⊗ R, and I for exact parameters.
        """
        projector, start, like = self.projector(call), 0, torch.zeros((), dtype=torch.float64, device="cpu")
        parts = []
        for shape in map(torch.Size, shapes):
            size = shape.numel()
            if projector.flat:
                parts += [block for _, block in projector.blocks(like, start, size)]
            elif projector.shrinks(shape):
                parts.append(torch.kron(*projector.factors(shape, start, like.dtype, like.device)))
            else:
                parts.append(torch.eye(size, dtype=torch.float64))
            start += size
        return torch.cat(parts, 1) if projector.flat else torch.block_diag(*parts)


@dataclass(frozen=True)
class Projector:
    """Holds the matrices of one call.

    Attributes:
        kind: as in `RandomProjection`.
        dim: k.
        key: seed, and number of the draw.
    """

    kind: Kind
    dim: int
    key: tuple[int, int]
    _factors: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def flat(self) -> bool:
        """Whether all of E has one sketch of k numbers, instead of one sketch per weight."""
        return self.kind != "kronecker"

    def shrinks(self, shape: Sequence[int]) -> bool:
        """Tells whether a parameter of this shape is projected by two factors."""
        return not self.flat and len(shape) > 1 and self.dim < min(shape[0], math.prod(shape[1:]))

    def sketches(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Computes P g for all samples, as tensors whose inner products add up.

        Args:
            gradients: gradients [N, *shape] of all compared parameters, in order.

        Returns:
            One tensor [N, k] for "gaussian"; one per parameter for "kronecker". In float32 at least.
        """
        start, found = 0, []
        for gradient in gradients:
            found.append(self.sketch(gradient, start))
            start += gradient.shape[1:].numel()
        return [torch.stack(found).sum(0)] if self.flat else found

    def sketch(self, gradient: Tensor, start: int) -> Tensor:
        """Computes the part of one parameter: a summand of the sketch for "gaussian", a whole sketch for "kronecker".

        Args:
            gradient: [N, *shape].
            start: where the parameter begins in the flat vector of all parameters.

        Returns:
            [N, k], [N, k, k], or the gradient itself if it is not projected.
        """
        gradient = wide(gradient)
        if self.flat:
            flat = gradient.reshape(len(gradient), -1)
            blocks = partial(self.blocks, start=start, size=flat.shape[1])
            projected: Tensor = _Projected.apply(flat, self.dim, blocks, False)
            return projected
        shape = gradient.shape[1:]
        if not self.shrinks(shape):
            return gradient
        left, right = self.factors(shape, start, gradient.dtype, gradient.device)
        return left @ gradient.flatten(2) @ right.T

    def factors(
        self, shape: Sequence[int], start: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Returns L [k, n] and R [k, m] for a weight that is projected.

        Args:
            shape: shape of the weight.
            start: as in `sketch`.
            dtype: dtype of the result.
            device: device of the result.

        Returns:
            Both factors.
        """
        key = (start, tuple(shape), dtype, device)
        if key not in self._factors:
            left, right = self._signs(shape[0], start, 0), self._signs(math.prod(shape[1:]), start, 1)
            self._factors[key] = left.to(device, dtype), right.to(device, dtype)
        return self._factors[key]

    def _signs(self, size: int, start: int, side: int) -> Tensor:
        """Draws a factor [k, size]: independent signs, divided by sqrt(k)."""
        generator = _generator(*self.key, start, side)
        signs = torch.randint(2, (self.dim, size), generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
        return signs / math.sqrt(self.dim)

    def blocks(self, like: Tensor, start: int, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Yields the columns of "gaussian" for one parameter, in blocks of bounded size.

        Args:
            like: a tensor with the dtype and device of the result.
            start: as in `sketch`.
            size: number of entries of the parameter.

        Yields:
            A slice of columns, and that block [k, n] of P. It is drawn on the CPU in float64, so that P does not depend
            on dtype or device.
        """
        generator = _generator(*self.key, start)
        step = max(1, _BLOCK // self.dim)
        for first in range(0, size, step):
            place = slice(first, min(first + step, size))
            shape = place.stop - first, self.dim
            block = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") / math.sqrt(self.dim)
            yield place, block.to(like).T


class _Projected(torch.autograd.Function):
    """Computes P x, or Pᵀ x; saves nothing for the derivative, which draws the same P again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, width: int, blocks: Callable[[Tensor], Iterator[tuple[slice, Tensor]]], transposed: bool
    ) -> Tensor:
        ctx.width, ctx.blocks, ctx.transposed = x.shape[1], blocks, transposed
        result = x.new_zeros(len(x), width)
        for place, block in blocks(x):
            if transposed:
                result[:, place] = x @ block
            else:
                result.addmm_(x[:, place], block.T)
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        projected: Tensor = _Projected.apply(cotangent, ctx.width, ctx.blocks, not ctx.transposed)
        return projected, None, None, None


def _generator(*key: int) -> torch.Generator:
    """Returns a generator on the CPU, so that its numbers depend on `key` but on no device."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:4], "big"))  # torch takes 32 bits
