"""docs/generators/help_page.py: what enters the verdict, and what it then says."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from pages import program

pytest.importorskip("scipy", reason="intervals need scipy (extra: examples)")


@pytest.fixture(scope="module")
def page() -> ModuleType:
    pytest.importorskip("tqdm", reason="some tables are written by the examples")
    return program("docs/generators/help_page")


def grid(**accuracies: list[float]) -> dict[str, Any]:
    """A grid with one run per number, seeds counted from 0."""
    runs = [
        {"variant": variant.replace("_", "-"), "seed": seed, "seconds": 1.0, "accuracies": [0.0, value]}
        for variant, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    return {"runs": runs}


PLAIN = [50.0, 51.0, 52.0, 53.0, 54.0]
BETTER = [52.0, 53.2, 53.9, 55.0, 56.1]


def test_rows_with_few_seeds_stay_out(page: ModuleType) -> None:
    found = {"help_new": grid(fixmatch=PLAIN, ggcr=PLAIN, ggcr_weak_constant=BETTER[:4])}
    table = page.verdict_table(found)
    assert "| **New** | | |" in table
    assert "λ = 0.1 | 52.0 ± 1.6 (5) | +0.0 [+0.0, +0.0] |" in table
    assert "weak view constant" not in table
    assert "weak view constant" in page._section("help_new", found["help_new"])


def test_fixmatch_alone_is_no_row(page: ModuleType) -> None:
    assert "**New**" not in page.verdict_table({"help_new": grid(fixmatch=PLAIN, ggcr=BETTER[:4])})


def test_the_headline_follows_the_runs(page: ModuleType) -> None:
    equal, gain = grid(fixmatch=PLAIN, ggcr=PLAIN), grid(fixmatch=PLAIN, ggcr=BETTER)
    assert page._headline({"help_a": equal}) == (
        "**No: none of the 1 settings with 5 or more seeds shows a gain in accuracy.**"
    )
    said = page._headline({"help_a": equal, "help_b": gain})
    assert said.startswith("**1 of 2 settings with 5 or more seeds show a gain in accuracy: B, ")


def test_pairs_count_and_not_runs(page: ModuleType) -> None:
    """Five seeds of the row and five of FixMatch, four of them the same."""
    shifted = grid(fixmatch=PLAIN, ggcr=BETTER)
    for run in shifted["runs"]:
        run["seed"] += run["variant"] == "ggcr"
    assert page.rows(page.ends(shifted), 5) == ["fixmatch"]
    assert page.rows(page.ends(shifted), 4) == ["fixmatch", "ggcr"]
