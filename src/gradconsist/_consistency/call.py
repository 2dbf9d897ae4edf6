"""The options and state of one call of a loss, without its pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from gradconsist._consistency.probed import Probed
from gradconsist._consistency.settings import Settings
from gradconsist._consistency.similarity import Criterion
from gradconsist._forward.batchnorm import Constants
from gradconsist._inputs.parameters import compared_parameters, trainable_parameters
from gradconsist.engines.projection import Projector


class Blend(NamedTuple):
    """Asks for one sum of both losses, ``term * L_g + sum of losses * l``, with l the strong views' losses.

    Attributes:
        term: factor of L_g.
        losses: factors of the strong views' losses, [B].
    """

    term: float
    losses: Tensor


@dataclass(frozen=True)
class Comparison:
    """The options and state of one call.

    Attributes:
        settings: the loss's options.
        criterion: what a pair adds to the loss.
        generator: source of randomness.
        probed: what earlier calls found out about the model; this call adds to it.
        statistics: constants for the BatchNorm calls, joint or one list per view; None to take them here.
        projection: matrices of this call, or None.
        measure: whether only numbers are wanted, without a derivative.
        losses: whether the strong views' losses are wanted, too.
        blend: their sum with L_g, if that is wanted instead of L_g.
    """

    settings: Settings
    criterion: Criterion
    generator: torch.Generator
    probed: Probed
    statistics: Constants | None = None
    projection: Projector | None = None
    measure: bool = False
    losses: bool = False
    blend: Blend | None = None

    @cached_property
    def compared(self) -> Mapping[str, Tensor]:
        """The compared parameters (E) and their names."""
        return compared_parameters(self.settings.model, self.settings.encoder)

    @cached_property
    def trainable(self) -> Mapping[str, Tensor]:
        """The parameters that L_g is differentiated for, and their names."""
        return trainable_parameters(self.settings.model)

    @property
    def constant(self) -> tuple[str | None, ...]:
        """Views whose gradient is held constant."""
        return ("weak", "strong") if self.measure else (self.settings.stop_gradient,)

    @property
    def dropout(self) -> bool:
        """Whether random layers stay on."""
        return self.settings.dropout == "on"

    @property
    def fused(self) -> bool:
        """Whether the gradient is formed in the forward; not if each loss may get another factor afterwards."""
        return self.settings.fused and not self.measure and (self.blend is not None or not self.losses)

    @property
    def reduction(self) -> str:
        """The loss's reduction; none for a measurement."""
        return "none" if self.measure else self.settings.reduction

    @property
    def through_statistics(self) -> bool:
        """Whether L_g is also differentiated through the joint statistics."""
        return self.settings.through_statistics and not self.measure

    @cached_property
    def wide(self) -> torch.dtype:
        """The dtype of products and loss: the widest of the compared parameters', float32 at least."""
        return reduce(torch.promote_types, (parameter.dtype for parameter in self.compared.values()), torch.float32)
