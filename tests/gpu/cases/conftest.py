"""Every case runs on `cuda:0`, simulated or real, and compares with the same calls on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from support.simulated_gpu import SimulatedGPU

SIMULATED = "SIMULATED_GPU" in os.environ


@pytest.fixture(autouse=True)
def gpu() -> Iterator[SimulatedGPU | None]:
    """The mode that computes for the simulated device; None on a real one."""
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device: tests/gpu/test_simulated.py runs these with a simulated one")
    if not SIMULATED:
        yield None
        return
    with SimulatedGPU() as mode:
        yield mode
