"""Layer rules: compute the gradient of a layer's parameter from the layer's input and output gradient.

For one call y = layer(x; p) on N samples, the gradient of sample i's loss for p is a function of x_i and of d_i, the
gradient of that loss for y_i. A rule is that function. It may also have a cheaper way to the inner products of a pair
than through the gradients. Everything is differentiable in x and d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gradconsist._inputs.precision import wide
from gradconsist.engines.ghost.conv import Geometry, sample_gradients
from gradconsist.engines.ghost.gram import Doubts, doubt, position_gram, row_gram
from gradconsist.engines.ghost.pixel import has_patch_form, has_pixel_form, patch_gram, pixel_gram

# An elementwise pass costs, per number, about as much as this many multiplications inside a matrix product.
_PASS = 20


class Rule(Protocol):
    """The rule of one parameter in one kind of call."""

    @property
    def name(self) -> str:
        """The name that `diagnostics.check` prints."""
        ...

    def gradients(self, x: Tensor | None, d: Tensor) -> Tensor:
        """Computes per-sample gradients [N, *parameter shape].

        The input [N, ...] is None if the rule does not need it; `d` has each sample's maps or positions folded into the
        rows.
        """
        ...

    def gram(self, x: Tensor | None, d: Tensor, doubts: Doubts | None = None) -> Tensor | None:
        """Computes M [n, 2, 2] of interleaved samples without forming gradients; None if the rule cannot.

        `doubts` gets an entry if M may have lost accuracy; see `gradconsist.engines.ghost.gram.doubt`.
        """
        return None

    def constant(self) -> Rule:
        """Returns the same rule with all its tensors detached."""
        return self

    def costs(self, x: Tensor | None, d: Tensor) -> tuple[float, float]:
        """Estimates multiplications per pair, derivative included, of `gradients` and of `gram`, to choose by."""
        return 1.0, math.inf


def _given(x: Tensor | None) -> Tensor:
    """Returns the input of a rule that always gets one."""
    if x is None:
        raise ValueError("this rule needs the layer's input")
    return x


@dataclass(frozen=True)
class LinearWeight(Rule):
    """Rule for y = x W^T with any number of leading dimensions: G = sum over positions of d_t x_t^T.

    Attributes:
        transposed: whether the product is y = x W: then input and output gradient change places.
    """

    transposed: bool = False
    name: str = "linear"

    def gradients(self, x: Tensor | None, d: Tensor) -> Tensor:
        """See `Rule`."""
        a, d = self.rows(x, d)
        return d.transpose(1, 2) @ a.to(d.dtype)

    def gram(self, x: Tensor | None, d: Tensor, doubts: Doubts | None = None) -> Tensor | None:
        """See `Rule`."""
        return position_gram(*self.rows(x, d), doubts)

    def costs(self, x: Tensor | None, d: Tensor) -> tuple[float, float]:
        """See `Rule`."""
        a, d = self.rows(x, d)
        positions, p, c = a.shape[1], d.shape[2], a.shape[2]
        formed = 6.0 * positions * p * c + 12.0 * _PASS * p * c
        return formed, 12.0 * positions**2 * (p + c) + 8.0 * _PASS * (2 * positions) ** 2

    def rows(self, x: Tensor | None, d: Tensor) -> tuple[Tensor, Tensor]:
        """Reshapes input and output gradient to [N, T, features], that of the weight's columns first."""
        x = _given(x)
        a, d = x.reshape(len(x), -1, x.shape[-1]), d.reshape(len(x), -1, d.shape[-1])
        return (d, a) if self.transposed else (a, d)


@dataclass(frozen=True)
class ConvolutionWeight(Rule):
    """Rule for y = conv(x, W), transposed or not: G by one grouped convolution, or inner products of positions."""

    shape: tuple[int, ...]
    geometry: Geometry
    name: str = "convolution"

    def gradients(self, x: Tensor | None, d: Tensor) -> Tensor:
        """See `Rule`."""
        x = _given(x)
        return sample_gradients(x, d.unflatten(0, x.shape[:2]), self.shape, self.geometry)

    def gram(self, x: Tensor | None, d: Tensor, doubts: Doubts | None = None) -> Tensor | None:
        """See `Rule`."""
        x = _given(x)
        if not self._has_gram(x):
            return None
        gram = pixel_gram if has_pixel_form(self.geometry) else patch_gram
        return gram(x.squeeze(1), d, self.shape[2:], self.geometry, doubts)

    def costs(self, x: Tensor | None, d: Tensor) -> tuple[float, float]:
        """See `Rule`."""
        x = _given(x)
        inside, outside = math.prod(x.shape[3:]), math.prod(d.shape[2:])
        kernel = math.prod(self.shape)
        positions = inside if self.geometry.transposed else outside
        formed = 6.0 * x.shape[1] * positions * kernel + 6.0 * _PASS * kernel
        if not self._has_gram(x):
            return formed, math.inf
        if not has_pixel_form(self.geometry):
            patch = math.prod(self.shape[1:])
            squared = (2 * outside) ** 2
            return formed, 3.0 * squared * (patch + d.shape[1]) + 8.0 * _PASS * (squared + outside * patch)
        products = 7.0 * (inside**2 * x.shape[2] + outside**2 * d.shape[1])
        passes = 3.0 * (2 + sum(self.shape[2:])) * (inside**2 + outside**2) * self.geometry.groups
        return formed, products + _PASS * passes

    def _has_gram(self, x: Tensor) -> bool:
        return x.shape[1] == 1 and (has_pixel_form(self.geometry) or has_patch_form(self.geometry))


@dataclass(frozen=True)
class Bias(Rule):
    """Rule for y = ... + b: sums d over everything but the channels.

    Attributes:
        channel: dimension of the channels, in outputs [N, maps, ...].
        maps: number of output rows per sample.
    """

    channel: int
    maps: int
    name: str = "bias"

    def gradients(self, x: Tensor | None, d: Tensor) -> Tensor:
        """See `Rule`."""
        d = d.unflatten(0, (-1, self.maps)).movedim(self.channel, -1)
        return wide(d).flatten(1, -2).sum(1)


@dataclass(frozen=True)
class EmbeddingWeight(Rule):
    """Rule for y_t = W[id_t]."""

    shape: tuple[int, ...]
    name: str = "embedding"

    def gradients(self, x: Tensor | None, d: Tensor) -> Tensor:
        """See `Rule`."""
        ids, d = self.positions(x, d)
        samples = ids.shape[0]
        start = torch.arange(samples, device=ids.device).unsqueeze(1) * self.shape[0]
        rows = d.new_zeros(samples * self.shape[0], self.shape[1])
        return rows.index_add(0, (ids + start).flatten(), d.flatten(0, 1)).view(samples, *self.shape)

    def gram(self, x: Tensor | None, d: Tensor, doubts: Doubts | None = None) -> Tensor | None:
        """Sums ⟨d_t, d_t'⟩ over pairs of positions with the same id."""
        ids, d = self.positions(x, d)
        samples, positions = ids.shape
        both = ids.reshape(samples // 2, 2 * positions)
        same = both.unsqueeze(1) == both.unsqueeze(2)
        rows = d.reshape(samples // 2, 2 * positions, -1)
        products = row_gram(rows).masked_fill(~same, 0.0)
        gram = products.view(-1, 2, positions, 2, positions).sum((2, 4))
        doubt(doubts, gram, products.detach().diagonal(dim1=1, dim2=2).reshape(-1, 2, positions).sum(2))
        return gram

    def costs(self, x: Tensor | None, d: Tensor) -> tuple[float, float]:
        """See `Rule`."""
        ids, d = self.positions(x, d)
        positions = ids.shape[1]
        return _PASS * 6.0 * math.prod(self.shape), 12.0 * positions**2 * (d.shape[2] + _PASS)

    def positions(self, x: Tensor | None, d: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ids [N, T] and output gradients [N, T, features], in float32 at least."""
        x = _given(x)
        ids = x.reshape(x.shape[0], -1)
        return ids, wide(d.reshape(*ids.shape, -1))

    def rows(self, x: Tensor | None, d: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the use as one of a linear layer: W[id_t] takes d_t where y = x W^T takes x_t, with 1 at id_t."""
        ids, d = self.positions(x, d)
        return d, F.one_hot(ids.long(), self.shape[0]).to(d.dtype)
