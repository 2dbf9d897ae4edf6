"""Shared set-up: the `support` package becomes importable, and every test starts from the same random state."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: more threads would only get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A fixed random state before each test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """The programs that tests run in this process silence the library's logger."""
    logger = logging.getLogger("gradconsist")
    level = logger.level
    yield
    logger.setLevel(level)
