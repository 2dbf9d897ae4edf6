"""Randomness by address instead of by state: draw number d of stream s is a pure function of (seed, s, d).

Nothing has to be saved to resume, and neither the number of workers nor the order in which they run can change a
draw. The source is Philox, a counter-based generator whose raw 64-bit output NumPy keeps stable across versions;
its convenience methods (`permutation`, `integers`) carry no such promise and are not used.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """What a draw is for; each purpose has its own stream."""

    SPLIT = 0
    LABELED_ORDER = 1
    UNLABELED_ORDER = 2
    LABELED_VIEW = 3
    WEAK_VIEW = 4
    STRONG_VIEW = 5
    HELD_OUT = 6


def raw(seed: int, stream: Stream, position: int, count: int) -> NDArray[np.uint64]:
    """`count` raw 64-bit draws at `position` of a stream."""
    # The lowest counter word advances with each draw; position sits above it, so positions never overlap.
    source = np.random.Philox(key=[seed, int(stream)], counter=[0, position, 0, 0])
    return source.random_raw(count)


def uniform(seed: int, stream: Stream, position: int, rows: int, columns: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) at `position` of a stream, `[rows, columns]`."""
    bits = raw(seed, stream, position, rows * columns) >> np.uint64(11)
    return (bits * 2.0**-53).reshape(rows, columns)


def permutation(seed: int, stream: Stream, position: int, count: int) -> NDArray[np.int64]:
    """A random order of `range(count)` at `position` of a stream: the order that sorts random keys."""
    return np.argsort(raw(seed, stream, position, count), kind="stable").astype(np.int64)


class EndlessOrder:
    """The indices of an endless pass over `count` items, reshuffled every epoch, addressed by draw number.

    Batches cross the end of an epoch, so 40 items serve batches of 64.
    """

    def __init__(self, seed: int, stream: Stream, count: int) -> None:
        self.seed, self.stream, self.count = seed, stream, count
        self._cached: dict[int, NDArray[np.int64]] = {}

    def draws(self, start: int, number: int) -> NDArray[np.int64]:
        """Items of the draws `start .. start + number - 1`."""
        positions = np.arange(start, start + number)
        epochs = positions // self.count
        # Only the epochs of this batch stay cached: the memory is bounded, and a resumed run recomputes them.
        self._cached = {
            epoch: self._cached[epoch]
            if epoch in self._cached
            else permutation(self.seed, self.stream, epoch, self.count)
            for epoch in sorted(set(epochs.tolist()))
        }
        items = np.empty(number, dtype=np.int64)
        for epoch, order in self._cached.items():
            chosen = epochs == epoch
            items[chosen] = order[positions[chosen] % self.count]
        return items
