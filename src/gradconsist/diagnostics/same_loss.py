"""Prepares a loss for diagnostics: without a method to observe, or on a float64 copy of its model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from gradconsist._consistency.settings import Settings
from gradconsist._forward.batchnorm import BatchNormCalls, Statistics, needs_statistics
from gradconsist._forward.per_sample import PerSampleForward
from gradconsist._forward.sandbox import comparison_scope
from gradconsist._forward.statistics import take_statistics
from gradconsist._inputs.batch import concatenable
from gradconsist._inputs.parameters import compared_parameters
from gradconsist._inputs.precision import has_float64
from gradconsist.errors import ConfigError, DeviceError
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.types import Inputs


def unobserved(consistency: object) -> Settings:
    """Checks the user's loss and returns its options, with joint statistics instead of observed ones."""
    if not isinstance(consistency, GradientConsistencyLoss):
        raise ConfigError(
            f"`consistency` is of type {type(consistency).__name__}: pass the GradientConsistencyLoss that you train"
            " with, so that its own options count."
        )
    own = consistency.settings
    return replace(own, batchnorm="auto") if own.batchnorm == "observed" else own


def check_float64(model: nn.Module) -> None:
    """Checks that the model's device computes in float64."""
    for device in {parameter.device for parameter in model.parameters()}:
        if not has_float64(device):
            raise DeviceError(f"this runs in float64, which {device} does not have: move model and inputs to the CPU.")


def double_of(consistency: GradientConsistencyLoss, **changes: Any) -> GradientConsistencyLoss:
    """Makes the same loss on a float64 copy of its model, over all pairs, with both views differentiated."""
    own = unobserved(consistency)
    check_float64(own.model)
    names = compared_parameters(own.model, own.encoder)  # a module of the model is none of the copy
    model = copy.deepcopy(own.model).double()
    model.zero_grad()
    return consistency.with_options(
        model=model,
        encoder=names.__contains__,
        batchnorm=own.batchnorm,
        max_pairs=None,
        stop_gradient=None,
        **changes,
    )


def statistics_here(loss: GradientConsistencyLoss, weak: Inputs, strong: Inputs) -> list[Statistics] | None:
    """Computes the statistics that the loss uses at the current weights, to hold them; None if it needs none."""
    own = loss.settings
    if not concatenable(weak, strong) and not needs_statistics(own.model, own.batchnorm):
        return None
    calls = BatchNormCalls(own.batchnorm)
    with comparison_scope(own.model, dropout=False):
        take_statistics(PerSampleForward(own.model, own.loss_fn, calls), weak, strong)
    return calls.recorded
