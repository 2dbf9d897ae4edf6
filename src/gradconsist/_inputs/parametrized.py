"""Keeps forwards away from the cache of parametrized weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.utils import parametrize


@contextmanager
def nothing_cached() -> Iterator[None]:
    """Recomputes parametrized weights inside the block, although the user called `parametrize.cached()`.

    A weight from the cache belongs to another forward: it has no graph if that one had none, or a graph to tensors that
    are replaced now. The forward in the block would silently get no gradient for it, or leave such a weight behind.

    Yields:
        None.
    """
    enabled = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled
