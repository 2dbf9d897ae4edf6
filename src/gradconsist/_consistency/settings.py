"""Checks and holds the options of a `GradientConsistencyLoss`, where they are documented."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gradconsist._forward.batchnorm import BatchNormPolicy
from gradconsist._forward.statistics import check_through_statistics
from gradconsist._inputs.cross_entropy import cross_entropy
from gradconsist._inputs.options import check_choice, check_count, check_number
from gradconsist._inputs.parameters import Encoder, compared_parameters
from gradconsist._refusals.models import check_model
from gradconsist.engines import Engine, make_engine
from gradconsist.engines.projection import RandomProjection
from gradconsist.errors import ConfigError
from gradconsist.types import LossFunction

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class Settings:
    """The checked options of a `GradientConsistencyLoss`, which documents them; `engine` is an object, never a name.

    Raises:
        ConfigError: an option has an invalid value, or two options do not go together.
        ParameterSelectionError: `encoder` selects nothing that is trainable.
        UnsupportedModuleError: the model contains a module for which the result would not be exact.
    """

    model: nn.Module
    encoder: Encoder
    loss_fn: LossFunction
    engine: Engine
    projection: RandomProjection | None
    batchnorm: BatchNormPolicy
    through_statistics: bool
    dropout: Literal["off", "on"]
    chunk_size: int | Literal["auto"] | None
    max_pairs: int | None
    stop_gradient: Literal["weak", "strong"] | None
    min_norm: float
    reduction: Reduction
    fused: bool

    def __post_init__(self) -> None:
        check_model(self.model)
        if self.projection is not None and not isinstance(self.projection, RandomProjection):
            raise ConfigError(
                f"`projection` is {self.projection!r}: pass RandomProjection(dim, kind, seed=...), or None."
            )
        if not callable(self.loss_fn) or isinstance(self.loss_fn, type):
            raise ConfigError(f"`loss_fn` is {self.loss_fn!r}: pass a function (output, target) -> [B], or None.")
        check_choice("batchnorm", self.batchnorm, ("auto", "batch", "running", "observed"))
        check_choice("dropout", self.dropout, ("off", "on"))
        check_choice("stop_gradient", self.stop_gradient, (None, "weak", "strong"))
        check_choice("reduction", self.reduction, ("mean", "sum", "none"))
        check_choice("fused", self.fused, (True, False))
        if self.chunk_size is not None and self.chunk_size != "auto":
            check_count("chunk_size", self.chunk_size)
        if self.max_pairs is not None:
            check_count("max_pairs", self.max_pairs)
        check_number("min_norm", self.min_norm, least=1e-18)  # its square must be a normal float32
        check_through_statistics(self.through_statistics, self.batchnorm, self.dropout)
        if self.reduction == "none" and self.fused:
            raise ConfigError(
                "`reduction='none'` needs `fused=False`: the fused gradient is already summed over the pairs, so"
                " weights applied to the result would be lost."
            )
        compared_parameters(self.model, self.encoder)
        object.__setattr__(self, "engine", make_engine(self.engine, self.projection))

    @property
    def default_loss(self) -> bool:
        """Whether targets go to the default cross-entropy."""
        return self.loss_fn is cross_entropy

    def __repr__(self) -> str:
        options: dict[str, Any] = {name: getattr(self, name) for name in SHOWN}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


OPTIONS = frozenset(Settings.__dataclass_fields__)
SHOWN = [name for name in Settings.__dataclass_fields__ if name not in ("model", "encoder", "loss_fn")]
