"""What holds around every forward that this library makes of a user's model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gradconsist.engines.base import explain
from gradconsist.errors import GradConsistError
from gradconsist.forward import comparison_scope
from gradconsist.randomness import preserved_randomness


def autocast_region(device: torch.device) -> tuple[str, torch.dtype] | None:
    """Device type and dtype of the caller's autocast region, or None."""
    kind = device.type
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


@contextmanager
def our_rules(
    model: nn.Module, device: torch.device, *, seed: int | None = None, dropout: bool = False
) -> Iterator[None]:
    """Random state, modes and flags as the rules of `forward` need them, and torch's limits explained.

    Args:
        model: the user's model.
        device: where it is.
        seed: of the block's random numbers; None if it may draw none.
        dropout: whether random layers stay on.

    Yields:
        None.

    Raises:
        UnsupportedModuleError: torch cannot differentiate the model; the message names the remedy.
        RuntimeError: an error of the model itself, as it was.
    """
    try:
        with (
            preserved_randomness(device, seed),
            comparison_scope(model, dropout=dropout),
            # Everything but the forwards runs in full precision: derivatives and sums are not for autocast.
            torch.autocast(device.type, enabled=False),
        ):
            yield
    except RuntimeError as error:
        refusal = None if isinstance(error, GradConsistError | torch.OutOfMemoryError) else explain(error)
        if refusal is None:
            raise
        raise refusal from error
