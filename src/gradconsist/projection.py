"""Random projections: inner products of short sketches in place of those of whole gradients.

`RandomProjection` is the user's option, `Projector` the matrices of one call. Engines hand a projector per-sample
gradients, or the two factors of a layer's gradient before it is formed, and take the products of what comes back.

Index letters: N samples, k = dim, [n, m] a weight read as a matrix, P entries of E.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from gradconsist.counter import buckets, derive, normals, signs
from gradconsist.validation import check_choice, check_count

Kind: TypeAlias = Literal["kronecker", "gaussian", "rademacher", "sparse"]
KINDS = ("kronecker", "gaussian", "rademacher", "sparse")

_BLOCK = 2**22  # entries of a projection matrix at a time


@dataclass(frozen=True)
class RandomProjection:
    """Compares P g_w with P g_s in place of g_w with g_s, for a random matrix P with E[PᵀP] = I.

    **What it gives.** Inner products without bias: for constant a and b, and P independent of them,

        E⟨Pa, Pb⟩ = aᵀ E[PᵀP] b = ⟨a, b⟩

    so the three products of a pair are right on average over P, and with one P for both views identical views have
    cosine 1.

    **What it does not give.** The cosine is a ratio of products, and biased: for a dense P of k rows,
    E[cos] = cos - cos (1 - cos²) / (2k) + O(1/k²), as for a correlation coefficient of k numbers, with a standard
    deviation of about (1 - cos²) / sqrt(k). So are L_g and its gradient, at the same order. `max_pairs` and the
    wrapper's `every` have no such bias. The norms of the record, and what `min_norm` bounds, are those of the sketches.

    The kinds differ in P and in cost:

    - "gaussian": k rows of independent normal numbers of variance 1/k. Var⟨Pa, Pb⟩ = (|a|²|b|² + ⟨a, b⟩²) / k.
    - "rademacher": entries ±1/sqrt(k), the variance less 2 Σ a_j² b_j² / k.
    - "sparse": every column has one entry ±1, in a random row (a count sketch); the variance of "rademacher", at the
      cost of one pass over the gradient.
    - "kronecker": weights with two dimensions or more are read as matrices [n, m] = [first, all others]. Where
      k < min(n, m), the gradient G is replaced by S = L G Rᵀ [k, k] with independent entries ±1/sqrt(k) in L [k, n]
      and R [k, m]; E⟨L A Rᵀ, L B Rᵀ⟩ = tr(E[LᵀL] A E[RᵀR] Bᵀ) = ⟨A, B⟩. All other parameters (biases, scales of
      norms, narrow weights) stay exact, and the products of parameters add up. Since G = Σ_t d_t a_tᵀ over positions
      t, S = Σ_t (L d_t)(R a_t)ᵀ: `GhostEngine` projects inputs and output gradients of linear layers, convolutions of
      all kinds and embeddings, and never forms G. Var |S|² <= (4/k + 2/k²) |GGᵀ|² + (2/k²) |G|⁴: about 4/k of |G|⁴
      where G has rank one, and towards 2/k² where its rank is high, since |GGᵀ|² >= |G|⁴ / rank.

    The flat kinds need the per-sample gradient first and add to its cost; they serve to study projections. Only
    "kronecker" can be faster than the exact products: docs/guides/cost.md has the measurements. P is drawn by blocks
    from a hash of (seed, number of the draw, position), and is the same in every engine, chunk and device, and in
    every process that has made as many calls.

    Args:
        dim: k, the rows of P, or of each factor. A "kronecker" projection with k >= min(n, m) for every weight is
            exact.
        kind: of matrix.
        seed: of the matrices, in [0, 2^63).
        resample_every: new matrices after so many calls of the loss; 0 or None keeps the first ones. The number of
            calls is in the loss's ``state_dict()``, so a resumed run goes on with the same matrices. `measure` uses the
            current ones and does not count.

    Raises:
        ConfigError: an option has no such value.

    Example:
        >>> projection = RandomProjection(3, "rademacher", seed=1)
        >>> p = projection.matrix([(2, 2), (2,)])
        >>> p.shape, torch.allclose(p.abs(), torch.tensor(3.0).double().rsqrt())
        (torch.Size([3, 6]), True)

    Source: Johnson and Lindenstrauss (1984); Achlioptas (2003) for signs; Charikar, Chen and Farach-Colton (2002) for
    the sparse kind; factors of layers as in LoGra (Choe et al., 2024).
    """

    dim: int
    kind: Kind = "kronecker"
    seed: int = field(default=0, kw_only=True)
    resample_every: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_count("dim", self.dim)
        check_choice("kind", self.kind, KINDS)
        check_count("seed", self.seed, least=0, most=2**63 - 1)
        if self.resample_every is not None:
            check_count("resample_every", self.resample_every, least=0)

    def projector(self, call: int = 0) -> Projector:
        """The matrices of a call.

        Args:
            call: how many calls came before it.

        Returns:
            What engines use.
        """
        draw = call // self.resample_every if self.resample_every else 0
        return Projector(self.kind, self.dim, derive(self.seed, draw))

    def matrix(self, shapes: Sequence[Sequence[int]], *, call: int = 0) -> Tensor:
        """P as a whole, to look at and to test with: large for all but small models.

        Args:
            shapes: of the compared parameters, in the model's order; their gradients, flattened and put one behind the
                other, are what P multiplies.
            call: as in `projector`.

        Returns:
            float64 [rows, P]: k rows for a flat kind; for "kronecker" the blocks L ⊗ R, and I for exact parameters.
        """
        projector, start, cpu = self.projector(call), 0, torch.device("cpu")
        parts = []
        for shape in map(torch.Size, shapes):
            size = shape.numel()
            if projector.flat:
                parts.append(projector.columns(start, start + size, cpu).T)
            elif projector.shrinks(shape):
                parts.append(torch.kron(*projector.factors(shape, start, torch.float64, cpu)))
            else:
                parts.append(torch.eye(size, dtype=torch.float64))
            start += size
        return torch.cat(parts, 1) if projector.flat else torch.block_diag(*parts)


@dataclass(frozen=True)
class Projector:
    """The matrices of one call.

    Attributes:
        kind: of `RandomProjection`.
        dim: k.
        key: which matrices.
    """

    kind: Kind
    dim: int
    key: int
    _factors: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def flat(self) -> bool:
        """Whether all of E has one sketch of k numbers, and not every weight its own."""
        return self.kind != "kronecker"

    def shrinks(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape is projected by two factors."""
        return not self.flat and len(shape) > 1 and self.dim < min(shape[0], math.prod(shape[1:]))

    def sketches(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """P g of the samples, as tensors whose inner products add up.

        Args:
            gradients: [N, *shape] of all compared parameters, in order.

        Returns:
            One tensor [N, k] for a flat kind; one a parameter for "kronecker". In float32 at least.
        """
        start, found = 0, []
        for gradient in gradients:
            found.append(self.sketch(gradient, start))
            start += gradient.shape[1:].numel()
        return [torch.stack(found).sum(0)] if self.flat else found

    def sketch(self, gradient: Tensor, start: int) -> Tensor:
        """The part of one parameter: what is to be added up for a flat kind, and stands alone for "kronecker".

        Args:
            gradient: [N, *shape].
            start: where the parameter begins in the flat vector of all.

        Returns:
            [N, k], [N, k, k], or the gradient itself where it is not projected.
        """
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if self.flat:
            projected: Tensor = _Projected.apply(wide.reshape(len(wide), -1), self, start)
            return projected
        shape = gradient.shape[1:]
        if not self.shrinks(shape):
            return wide
        left, right = self.factors(shape, start, wide.dtype, wide.device)
        return left @ wide.flatten(2) @ right.T

    def factors(
        self, shape: Sequence[int], start: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """L [k, n] and R [k, m] of a weight that shrinks.

        Args:
            shape: of the weight.
            start: as in `sketch`.
            dtype: of the result.
            device: of the result.

        Returns:
            Both factors.
        """
        key = (start, tuple(shape), dtype, device)
        if key not in self._factors:
            sides = enumerate((shape[0], math.prod(shape[1:])))
            drawn = [signs(derive(self.key, start, side), 0, size, self.dim, device) for side, size in sides]
            left, right = (part.T.to(dtype) / math.sqrt(self.dim) for part in drawn)
            self._factors[key] = left, right
        return self._factors[key]

    def columns(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Columns start, ..., stop - 1 of a flat kind's P, transposed: float64 [stop - start, k]."""
        if self.kind == "gaussian":
            return normals(self.key, start, stop, self.dim, device) / math.sqrt(self.dim)
        if self.kind == "rademacher":
            return signs(self.key, start, stop, self.dim, device).double() / math.sqrt(self.dim)
        bucket, sign = buckets(self.key, start, stop, self.dim, device)
        zeros = torch.zeros(stop - start, self.dim, dtype=torch.float64, device=device)
        return zeros.scatter_(1, bucket[:, None], sign[:, None].double())

    def blocks(self, start: int, size: int) -> list[tuple[int, int]]:
        """Bounds of blocks of columns, relative to `start`, that are drawn at a time."""
        step = _BLOCK if self.kind == "sparse" else max(1, _BLOCK // self.dim)
        return [(at, min(at + step, size)) for at in range(0, size, step)]

    def project(self, flat: Tensor, start: int) -> Tensor:
        """[N, size] -> [N, k], block by block."""
        result = flat.new_zeros(len(flat), self.dim)
        for first, last in self.blocks(start, flat.shape[1]):
            part = flat[:, first:last]
            if self.kind == "sparse":
                bucket, sign = buckets(self.key, start + first, start + last, self.dim, flat.device)
                result.index_add_(1, bucket, part * sign)
            else:
                result.addmm_(part, self.columns(start + first, start + last, flat.device).to(flat.dtype))
        return result

    def lift(self, sketch: Tensor, start: int, size: int) -> Tensor:
        """The transposed map, [N, k] -> [N, size]."""
        result = sketch.new_empty(len(sketch), size)
        for first, last in self.blocks(start, size):
            if self.kind == "sparse":
                bucket, sign = buckets(self.key, start + first, start + last, self.dim, sketch.device)
                result[:, first:last] = sketch[:, bucket] * sign
            else:
                block = self.columns(start + first, start + last, sketch.device).to(sketch.dtype)
                result[:, first:last] = sketch @ block.T
        return result


class _Projected(torch.autograd.Function):
    """g -> P g; nothing is kept for the derivative, which draws the same P again."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, projector: Projector, start: int) -> Tensor:
        ctx.projector, ctx.start, ctx.size = projector, start, flat.shape[1]
        return projector.project(flat, start)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        lifted: Tensor = _Lifted.apply(cotangent, ctx.projector, ctx.start, ctx.size)
        return lifted, None, None


class _Lifted(torch.autograd.Function):
    """v -> Pᵀ v."""

    @staticmethod
    def forward(ctx: Any, sketch: Tensor, projector: Projector, start: int, size: int) -> Tensor:
        ctx.projector, ctx.start = projector, start
        return projector.lift(sketch, start, size)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        projected: Tensor = _Projected.apply(cotangent, ctx.projector, ctx.start)
        return projected, None, None, None
