"""A loss as it is trained, for diagnostics: with no method to observe, or on a copy of the model in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from gradconsist._consistency.settings import Settings
from gradconsist._forward.batchnorm import BatchNormCalls, Statistics, needs_statistics
from gradconsist._forward.per_sample import PerSampleForward
from gradconsist._forward.sandbox import comparison_scope
from gradconsist._forward.statistics import take_statistics
from gradconsist._inputs.batch import concatenable
from gradconsist._inputs.parameters import Encoder
from gradconsist.errors import ConfigError
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.types import Inputs


def unobserved(consistency: object) -> Settings:
    """The options of a loss; joint statistics in place of observed ones.

    Args:
        consistency: what the user passed as the loss.

    Returns:
        Its options.

    Raises:
        ConfigError: it is no loss.
    """
    if not isinstance(consistency, GradientConsistencyLoss):
        raise ConfigError(
            f"`consistency` is a {type(consistency).__name__}: pass the GradientConsistencyLoss that you train with, so"
            " that its own options are looked at."
        )
    own = consistency.settings
    return replace(own, batchnorm="auto") if own.batchnorm == "observed" else own


def double_of(consistency: GradientConsistencyLoss, **changes: Any) -> GradientConsistencyLoss:
    """The same loss on a copy of its model in float64, of all pairs, with both views differentiated.

    Args:
        consistency: the loss; it and its model stay untouched.
        **changes: further options.

    Returns:
        A loss.
    """
    own = unobserved(consistency)
    model = copy.deepcopy(own.model).double()
    model.zero_grad()
    encoder = _names_in_copy(own.model, own.encoder)
    return consistency.with_options(
        model=model, encoder=encoder, batchnorm=own.batchnorm, max_pairs=None, stop_gradient=None, **changes
    )


def statistics_here(loss: GradientConsistencyLoss, weak: Inputs, strong: Inputs) -> list[Statistics] | None:
    """The statistics that the loss takes at this point, to be held there; None where it needs none."""
    own = loss.settings
    if not concatenable(weak, strong) and not needs_statistics(own.model, own.batchnorm):
        return None
    calls = BatchNormCalls(own.batchnorm)
    with comparison_scope(own.model, dropout=False):
        take_statistics(PerSampleForward(own.model, own.loss_fn, calls), weak, strong)
    return calls.recorded


def _names_in_copy(model: nn.Module, encoder: Any) -> Encoder:
    """An encoder that also names the parameters of a copy of the model: modules become predicates on names."""
    if encoder is None or (callable(encoder) and not isinstance(encoder, nn.Module)):
        return encoder
    modules: Iterable[nn.Module] = [encoder] if isinstance(encoder, nn.Module) else encoder
    wanted = {id(parameter) for module in modules for parameter in module.parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in wanted}
    return names.__contains__
