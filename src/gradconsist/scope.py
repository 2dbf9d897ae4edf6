"""What holds around every forward that this library makes of a user's model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from gradconsist.engines.base import explain
from gradconsist.errors import GradConsistError
from gradconsist.failures import model_failure
from gradconsist.forward import PerSampleForward, comparison_scope
from gradconsist.normalization import WEAK, BatchNormCalls
from gradconsist.randomness import preserved_randomness
from gradconsist.types import Inputs


def autocast_region(device: torch.device) -> tuple[str, torch.dtype] | None:
    """Device type and dtype of the caller's autocast region, or None."""
    kind = device.type
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


@contextmanager
def our_rules(
    model: nn.Module,
    device: torch.device,
    views: Mapping[str, Inputs],
    *,
    seed: int | None = None,
    dropout: bool = False,
) -> Iterator[None]:
    """Random state, modes and flags as the rules of `forward` need them, and errors of torch explained.

    Args:
        model: the user's model.
        device: where it is.
        views: what the model runs on, by the name that a message should use.
        seed: of the block's random numbers; None if it may draw none.
        dropout: whether random layers stay on.

    Yields:
        None.

    Raises:
        UnsupportedModuleError: torch cannot differentiate the model; the message names the remedy.
        InputTypeError: the model's forward does not take such views.
        ModelError: the model or its loss failed with an error of torch's or Python's own.
    """
    try:
        with (
            preserved_randomness(device, seed),
            comparison_scope(model, dropout=dropout),
            # Everything but the forwards runs in full precision: derivatives and sums are not for autocast.
            torch.autocast(device.type, enabled=False),
        ):
            yield
    except Exception as error:
        refusal = _refusal(error, model, device, views)
        if refusal is None:
            raise
        raise refusal from error


def _refusal(
    error: Exception, model: nn.Module, device: torch.device, views: Mapping[str, Inputs]
) -> GradConsistError | None:
    if isinstance(error, GradConsistError | torch.OutOfMemoryError):
        return None
    limit = explain(error) if isinstance(error, RuntimeError) else None
    return limit or model_failure(error, model, views, partial(_works, model, device))


def _works(model: nn.Module, device: torch.device, inputs: Inputs) -> bool:
    """Whether the model alone runs on `inputs`."""
    forward = PerSampleForward(model, lambda output, target: target, BatchNormCalls("auto"))
    try:
        with preserved_randomness(device, seed=0), comparison_scope(model, dropout=False), torch.no_grad():
            forward.output(inputs, WEAK, record=True)
    except (GradConsistError, torch.OutOfMemoryError):
        return True  # refused for another reason, or only too large
    except Exception:
        return False
    return True
