"""The pages on torch's derivatives say what the result files say, and the files what must hold."""

from __future__ import annotations

from types import ModuleType

import pytest
from pages import ROOT, program


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    return program("derivative_pages")


def test_the_page_of_the_sweep_is_fresh(writer: ModuleType) -> None:
    page = (ROOT / "docs" / "derivative-sweep.md").read_text(encoding="utf-8")
    assert page == writer.sweep_page(), "run: python benchmarks/derivative_pages.py"


def test_the_summary_is_fresh(writer: ModuleType) -> None:
    page = (ROOT / "docs" / "torch-derivatives.md").read_text(encoding="utf-8")
    assert page == writer.with_summary(page), "run: python benchmarks/derivative_pages.py"


def test_no_engine_was_wrong_and_no_name_left_out(writer: ModuleType) -> None:
    results = writer.sweeps()
    assert results
    for version, result in results.items():
        assert not result["wrong"]["library"], version
        assert not result["uncovered"], version
