"""The tables of docs/guides/reproduce-the-paper.md from benchmarks/results/reproduce_demo.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from shared import between


def grid_tables(result: dict[str, Any]) -> str:
    """The tables of a grid, without the version that the file keeps: the revision says more, and pages renew none.

    Args:
        result: `tables.json` of a grid.

    Returns:
        Markdown.
    """
    from trainer.tables import markdown

    places = [{key: value for key, value in place.items() if key != "gradconsist"} for place in result["environments"]]
    return markdown({**result, "environments": places}, level=3)


def with_paper_tables(page: str, result: dict[str, Any]) -> str:
    """The page with two of the tables, fresh, between its markers; the command prints all.

    Args:
        page: The guide.
        result: `tables.json` of a grid.

    Returns:
        The guide.
    """
    shown = {name: result["tables"][name] for name in ("main", "ablation")}
    return between(page, "paper", grid_tables({**result, "tables": shown}).removesuffix("\n"))
