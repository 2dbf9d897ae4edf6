"""Keeps the process's random state unchanged by a comparison, detects draws inside a model, and restores generators."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradconsist.errors import DeviceError, StateError, UnsupportedModuleError


def _numpy_random() -> Any:
    """Returns NumPy's global generator, or None if NumPy was not imported."""
    return getattr(sys.modules.get("numpy"), "random", None)


def _generator_of(device: torch.device) -> tuple[Any, tuple[torch.device, ...]]:
    """Returns the module of a device other than the CPU (torch.cuda, torch.xpu, ...), and how to tell it the device."""
    module = getattr(torch, device.type, None)
    lacking = [name for name in ("get_rng_state", "set_rng_state", "manual_seed") if not hasattr(module, name)]
    if lacking:
        raise DeviceError(
            f"the model is on {device}, whose random state cannot be kept: `torch.{device.type}` has no"
            f" {' and no '.join(f'`{name}`' for name in lacking)}. Use a backend that has, or move model and inputs to"
            " the CPU."
        )
    return module, () if device.type == "mps" else (device,)


def _seed(device: torch.device, seed: int) -> None:
    module, _ = _generator_of(device)
    generators = getattr(module, "default_generators", None)  # `manual_seed` seeds the current device, not this one
    (generators[device.index or 0] if generators else module).manual_seed(seed)


def _state(device: torch.device) -> tuple[Any, ...]:
    own = None
    if device.type != "cpu":
        module, which = _generator_of(device)
        own = module.get_rng_state(*which)
    numpy = _numpy_random()
    return torch.get_rng_state(), own, random.getstate(), None if numpy is None else numpy.get_state(legacy=False)


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    device = first[1] is None or torch.equal(first[1], second[1])
    numpy = pickle.dumps(first[3]) == pickle.dumps(second[3])  # a dict that holds an array
    return torch.equal(first[0], second[0]) and device and first[2] == second[2] and numpy


@contextmanager
def preserved_randomness(device: torch.device, seed: int | None) -> Iterator[None]:
    """Seeds random numbers for the block, or forbids them, and restores the user's random state afterwards.

    Preserves the generators of `device`, the CPU, Python and NumPy. Without a seed, a number that is drawn inside the
    block raises an UnsupportedModuleError.
    """
    before = _state(device)
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            if _numpy_random():
                _numpy_random().seed(seed % 2**32)
            if device.type != "cpu":
                _seed(device, seed)
        yield
        if seed is None and not _same(before, _state(device)):
            raise UnsupportedModuleError(
                "the model drew random numbers although `dropout='off'` turned its dropout off: put the random part in"
                " eval mode, or use `dropout='on'`, which compares with an independent draw per view. If another thread"
                " drew them meanwhile, let it wait."
            )
    finally:
        torch.set_rng_state(before[0])
        if before[1] is not None:
            module, which = _generator_of(device)
            module.set_rng_state(before[1], *which)
        random.setstate(before[2])
        if before[3] is not None:
            _numpy_random().set_state(before[3])


def restore_generator(generator: torch.Generator, state: object) -> None:
    """Sets a generator on the CPU to what a ``get_state()`` returned, on any device; else raises a StateError."""
    try:
        # A copy: torch reads a view, such as a row of gathered states, from the wrong place and crashes.
        generator.set_state(state.cpu().clone())  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError, TypeError) as error:
        raise StateError(f"`state['generator']` is not the state of a torch.Generator: {error}") from error


class GeneratorOwner:
    """Makes an object with a generator, as ``_generator``, fit for copies and pickles.

    Generators cannot be copied or pickled in every supported torch.
    """

    _generator: torch.Generator

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._generator = torch.Generator()
        self._generator.set_state(state["_generator"])
