"""docs/generators/help_page.py: what enters the verdict, and what it then says."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from pages import program

from trainer.statistics import difference_text

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
    table = page.verdict_table(page.verdict_rows(found, {}))
    assert "| **New** | | |" in table
    assert "λ = 0.1 | 52.0 ± 1.6 (5) | +0.0 [+0.0, +0.0] |" in table
    assert "weak view constant" not in table
    assert "weak view constant" in page._section("help_new", found["help_new"])


def test_fixmatch_alone_is_no_row(page: ModuleType) -> None:
    assert page.verdict_rows({"help_new": grid(fixmatch=PLAIN, ggcr=BETTER[:4])}, {}) == []


def test_the_headline_follows_the_runs(page: ModuleType) -> None:
    equal, gain = grid(fixmatch=PLAIN, ggcr=PLAIN), grid(fixmatch=PLAIN, ggcr=BETTER)
    assert page.headline(page.verdict_rows({"help_a": equal}, {})) == (
        "**No: none of the 1 settings with 5 or more seeds shows a gain in accuracy.**"
    )
    said = page.headline(page.verdict_rows({"help_a": equal, "help_b": gain}, {}))
    assert said.startswith("**1 of 2 settings with 5 or more seeds show a gain in accuracy: B, ")


def test_pairs_count_and_not_runs(page: ModuleType) -> None:
    """Five seeds of the row and five of FixMatch, four of them the same."""
    shifted = grid(fixmatch=PLAIN, ggcr=BETTER)
    for run in shifted["runs"]:
        run["seed"] += run["variant"] == "ggcr"
    assert page.rows(page.ends(shifted), 5) == ["fixmatch"]
    assert page.rows(page.ends(shifted), 4) == ["fixmatch", "ggcr"]


def search(gain: float) -> dict[str, Any]:
    """A result of search_settings.py: one setting, held out and on test images, with such a gain by seed."""
    names = {"FixMatch, 40 labels": 0.0, "weight 1": gain}
    runs = {
        name: {str(seed): [0.5 + seed / 100 + plus / 100, 1.0, 4] for seed in range(5)} for name, plus in names.items()
    }
    gap = {"n": 5, "mean": gain, "low": gain - 0.1, "high": gain + 0.1}
    summary = [
        {"stage": stage, "name": name, "term": name == "weight 1", "base": "FixMatch, 40 labels", "n": 5, "mean": 52.0,
         "sd": 1.6, "minus_base": gap if name == "weight 1" else None}
        for stage in ("search", "confirm") for name in names
    ]  # fmt: skip
    return {"summary": summary, "runs": {"search": runs, "confirm": runs}}


@pytest.mark.parametrize(("gain", "said"), [(2.0, "1 gained there: weight 1"), (0.0, "none gained there")])
def test_a_search_enters_the_verdict(page: ModuleType, gain: float, said: str) -> None:
    searches = {"digits_search": search(gain)}
    rows = page.verdict_rows({}, searches)
    assert [(row.name, row.term, round(row.gap.mean, 9) if row.gap else None) for row in rows] == [
        ("FixMatch, 40 labels", False, None), ("weight 1", True, gain),
    ]  # fmt: skip
    assert said in page.search_text(searches)
    assert "A search** over 1 settings on held-out digits, 5 seeds each" in page.search_text(searches)
    assert page.headline(rows).startswith("**1 of 1" if gain else "**No: none of the 1")


def test_a_difference_that_rounds_to_zero_has_no_minus_sign():
    numbers = {"mean": -0.04, "low": -0.06, "high": -0.01, "n": 5}
    assert difference_text(numbers) == "+0.0 [-0.1, +0.0] (5)"
