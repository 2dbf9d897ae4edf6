"""The sweep of torch's derivatives found what must hold."""

from __future__ import annotations

from types import ModuleType

import pytest
from pages import program


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    return program("docs/generators/derivatives_page")


def test_no_engine_was_wrong_and_no_name_left_out(writer: ModuleType) -> None:
    results = writer.sweeps()
    assert results
    for version, result in results.items():
        assert not result["wrong"]["library"], version
        assert not result["uncovered"], version
