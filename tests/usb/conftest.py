"""These tests run where semilearn is installed: make test-usb."""

from __future__ import annotations

import numpy
import pytest

from support import usb


@pytest.fixture(scope="session", autouse=True)
def _semilearn() -> None:
    try:
        usb.semilearn()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _numpy_seeded() -> None:
    """MixMatch draws its mixing from NumPy."""
    numpy.random.seed(0)
