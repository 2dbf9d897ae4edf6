"""Devices other than CPU and CUDA: the random state of the device of the model, by stand-ins for torch's modules."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradconsist._forward.randomness import preserved_randomness
from gradconsist.diagnostics.peaks import peak_of, seconds_of
from gradconsist.errors import DeviceError, UnsupportedModuleError


class Backend:
    """A device module with one generator per device; MPS names no device, and has no `default_generators`."""

    def __init__(self, devices: int | None) -> None:
        self.generators = [torch.Generator().manual_seed(9 + number) for number in range(devices or 1)]
        if devices is not None:
            self.default_generators = tuple(self.generators)

    def get_rng_state(self, *device: torch.device) -> Tensor:
        return self._of(*device).get_state()

    def set_rng_state(self, state: Tensor, *device: torch.device) -> None:
        self._of(*device).set_state(state)

    def manual_seed(self, seed: int) -> None:
        self.generators[0].manual_seed(seed)

    def draw(self, number: int) -> float:
        return float(torch.rand((), generator=self.generators[number]))

    def _of(self, *device: torch.device) -> torch.Generator:
        assert len(device) == hasattr(self, "default_generators")
        return self.generators[(device[0].index or 0) if device else 0]


@pytest.mark.parametrize(("name", "devices"), [("xpu", 2), ("mps", None)])
def test_the_state_of_the_models_device_is_kept_and_seeded(
    name: str, devices: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Backend(devices)
    monkeypatch.setattr(torch, name, backend)
    number = 1 if devices else 0
    device = torch.device(name, number)
    before = [generator.get_state() for generator in backend.generators]
    draws = []
    for _ in range(2):
        with preserved_randomness(device, seed=4):
            draws.append(backend.draw(number))
        assert all(map(torch.equal, before, (generator.get_state() for generator in backend.generators)))
    assert draws[0] == draws[1] == float(torch.rand((), generator=torch.Generator().manual_seed(4)))
    with (
        pytest.raises(UnsupportedModuleError, match="drew random numbers although"),
        preserved_randomness(device, seed=None),
    ):
        backend.draw(number)
    assert all(map(torch.equal, before, (generator.get_state() for generator in backend.generators)))


def test_a_backend_without_random_state_is_refused() -> None:
    with (
        pytest.raises(DeviceError, match="no `get_rng_state` and no `set_rng_state` and no `manual_seed`"),
        preserved_randomness(torch.device("hpu"), seed=0),
    ):
        pass


def test_peak_memory_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    known: dict[str, Callable[..., Any]] = {
        "synchronize": calls.append,
        "reset_peak_memory_stats": calls.append,
        "memory_allocated": lambda device: 30,
        "max_memory_allocated": lambda device: 100,
    }
    monkeypatch.setattr(torch, "xpu", SimpleNamespace(**known))
    assert peak_of(lambda: calls.append("run"), torch.device("xpu")) == 70
    assert calls == [torch.device("xpu"), torch.device("xpu"), "run", torch.device("xpu")]
    assert seconds_of(lambda: None, torch.device("xpu")) >= 0
    monkeypatch.setattr(torch, "mps", SimpleNamespace(synchronize=None))
    with pytest.raises(DeviceError, match="mps does not count its peak memory: measure on CUDA or on the CPU"):
        peak_of(lambda: None, torch.device("mps"))
