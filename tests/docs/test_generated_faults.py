"""The guide about faults says what its two programs found, and they found nothing wrong."""

from __future__ import annotations

from types import ModuleType

import pytest
from pages import ROOT, program


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    return program("docs/generators/faults_page")


def test_the_tables_have_a_place() -> None:
    page = (ROOT / "docs" / "guides" / "faults.md").read_text(encoding="utf-8")
    assert all(page.count(f"<!-- {name}:begin -->") == 1 for name in ("kills", "control", "hostile"))


def test_every_killed_run_is_equal_and_every_forgotten_item_is_noticed(writer: ModuleType) -> None:
    kills, _ = writer.results()
    assert kills["parts"]
    assert all(row["equal"] == row["runs"] for row in kills["parts"])
    assert all(row["noticed"] == (row["item"] != "nothing") for row in kills["control"])


def test_every_hostile_file_is_answered_as_it_should_be(writer: ModuleType) -> None:
    _, hostile = writer.results()
    assert all(row["right"] == row["cases"] for row in hostile["rows"])
