"""What a loss holds: its options, and its state between calls, which is saved, loaded, copied and pickled."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from gradconsist._consistency.advice import IdleCalls
from gradconsist._consistency.probed import Probed
from gradconsist._consistency.settings import OPTIONS, Settings
from gradconsist._forward.randomness import GeneratorOwner, restore_generator
from gradconsist.errors import StateError


class OwnState(GeneratorOwner):
    """Holds a loss's options, random source, number of calls and findings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Neither reading the seed nor drawing from our own generator changes the global one.
        self._generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        self._probed = Probed()
        self._idle = IdleCalls()
        self._calls = 0  # selects the projection's matrices

    def __getattr__(self, name: str) -> Any:
        """Looks up options as attributes of the loss; you can also set them between calls."""
        settings = vars(self).get("settings")
        if name in OPTIONS and settings is not None:
            return getattr(settings, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            name, value = "settings", replace(self.settings, **{name: value})
        super().__setattr__(name, value)

    def with_options(self, **changes: Any) -> Self:
        """Makes a new loss with some of the constructor's options changed; it shares no state with this one."""
        return type(self)(**{**vars(self.settings), "engine": copy.deepcopy(self.settings.engine), **changes})

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state of the loss's own generator, which `max_pairs` and ``dropout="on"`` draw from.

        It also holds the number of calls, if a projection selects its matrices by it, and the size of the chunk that
        fitted, if the device ran out of memory.
        """
        calls = {} if self.settings.projection is None else {"calls": torch.tensor(self._calls)}
        chunk = {} if self._probed.fitted is None else {"chunk": torch.tensor(self._probed.fitted)}
        return {"generator": self._generator.get_state(), **calls, **chunk}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned; raises a `StateError` for anything else."""
        expected = {"generator"} if self.settings.projection is None else {"generator", "calls"}
        known = isinstance(state, Mapping) and set(state) - {"chunk"} == expected
        if not known or not all(isinstance(part, Tensor) for part in state.values()):
            found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            form = ", ".join(f"{name!r}: Tensor" for name in sorted(expected, reverse=True))
            raise StateError(f"`state` holds {found}, expected {{{form}}}: pass this class's state_dict.")
        numbers = {name: part for name, part in state.items() if name != "generator"}
        for name, number in numbers.items():
            if number.dtype != torch.int64 or number.numel() != 1 or int(number) < (name == "chunk"):
                raise StateError(f"`state[{name!r}]` is {number}, expected a count: pass this class's state_dict.")
        restore_generator(self._generator, state["generator"])
        self._calls = int(numbers.get("calls", 0))
        self._probed.fitted = int(numbers["chunk"]) if "chunk" in numbers else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.settings.model).__name__}, {self.settings!r})"
