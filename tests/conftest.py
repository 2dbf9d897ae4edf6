"""Shared set-up: the `support` package becomes importable, and every test starts from the same random state."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A fixed random state before each test, whatever ran before it."""
    torch.manual_seed(0)
