"""The tables of docs/guides/reproduce-the-paper.md from benchmarks/results/reproduce_demo.json."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))


def with_paper_tables(page: str, result: dict[str, Any]) -> str:
    """The page with fresh tables between its markers.

    Args:
        page: The guide.
        result: `tables.json` of a grid.

    Returns:
        The guide.
    """
    from recipes.tabletext import markdown

    # The file keeps the version; here the revision says more, and a page has no version to renew.
    places = [{key: value for key, value in place.items() if key != "gradconsist"} for place in result["environments"]]
    result = {**result, "environments": places}
    tables = f"<!-- paper:begin -->\n{markdown(result, level=3)}<!-- paper:end -->"
    return re.sub(r"<!-- paper:begin -->.*?<!-- paper:end -->", lambda _: tables, page, flags=re.S)
