"""The random state of the process: untouched by a comparison, and a witness of chance inside a model."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradconsist.errors import UnsupportedModuleError


def _numpy_random() -> Any:
    """NumPy's own generator, where a model may have imported it."""
    return getattr(sys.modules.get("numpy"), "random", None)


def _state(device: torch.device) -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    numpy = _numpy_random()
    return torch.get_rng_state(), cuda, random.getstate(), None if numpy is None else numpy.get_state(legacy=False)


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    cuda = first[1] is None or torch.equal(first[1], second[1])
    # As text: the state holds an array, which NumPy abbreviates, and a position in it, which every draw changes.
    return torch.equal(first[0], second[0]) and cuda and first[2] == second[2] and str(first[3]) == str(second[3])


@contextmanager
def preserved_randomness(device: torch.device, seed: int | None) -> Iterator[None]:
    """Gives the block random numbers from `seed`, or none at all, and restores the user's random state after it.

    Args:
        device: where the model is; its generator is preserved beside the CPU's and Python's own.
        seed: seed for the block, or None if nothing in it may draw a number.

    Yields:
        None.

    Raises:
        UnsupportedModuleError: `seed` is None and a number was drawn.
    """
    before = _state(device)
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            if _numpy_random():
                _numpy_random().seed(seed % 2**32)
            if device.type == "cuda":
                torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        yield
        if seed is None and not _same(before, _state(device)):
            raise UnsupportedModuleError(
                "the model drew random numbers though `dropout='off'` switched its dropout off: put the random part in"
                " eval mode, or use `dropout='on'`, which compares with an independent draw per view. If another thread"
                " drew them meanwhile, let it wait."
            )
    finally:
        torch.set_rng_state(before[0])
        if before[1] is not None:
            torch.cuda.set_rng_state(before[1], device)
        random.setstate(before[2])
        if before[3] is not None:
            _numpy_random().set_state(before[3])
