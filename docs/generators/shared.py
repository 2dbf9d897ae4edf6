"""What the pages share: results, tables, and where a figure comes from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Every program that writes a result, by the name under which the result knows it.
PROGRAMS = {
    path.name: path.relative_to(ROOT).as_posix()
    for folder in ("benchmarks", "tests/slow")
    for path in (ROOT / folder).rglob("*.py")
}
# A page of the appendix: long tables, which the search leaves out.
APPENDIX = "---\nsearch:\n  exclude: true\n---\n\n"
# The median of a ratio, and its range, in two columns.
RATIO = {"times as long": "ratio_median:.2f", "range": "range"}


def between(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.S)


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Markdown; a column is a key, and after a colon a format (a closing letter x is kept)."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        cells = [_cell(row, column) for column in columns.values()]
        if row.get("reason"):
            first = next(i for i, cell in enumerate(cells) if cell == "")
            cells[first] = "not run: " + str(row["reason"]).split(". ")[0].replace("|", "/")[:160]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], column: str) -> str:
    key, _, form = column.partition(":")
    value = row.get(key)
    if value is None:
        return ""
    return f"{value:{form.removesuffix('x')}}" + ("x" if form.endswith("x") else "") if form else str(value)


def with_range(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the range of its ratio as text."""
    return row | {"range": f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"}


def made(result: dict[str, Any]) -> str:
    environment = result["environment"]
    clock = result.get("setting", {}).get("clock", "wall")
    return f"Made by `{command(result)}`: {clock} clock, torch {environment['torch']}, {environment['device']}."


def command(result: dict[str, Any]) -> str:
    """The command that made a result, as a reader would type it.

    A result knows the program without its folder, and names of variants, which have spaces, without quotes.
    """
    program, _, arguments = str(result["environment"]["command"]).removeprefix("python ").partition(" ")
    variants = {str(row.get("variant", "")) for row in result.get("rows", []) if isinstance(row, dict)}
    spaced = sorted((variant for variant in variants if " " in variant), key=len, reverse=True)
    if "--only" in arguments and spaced:
        arguments = re.sub("|".join(map(re.escape, spaced)), lambda found: f'"{found[0]}"', arguments)
    arguments = re.sub(r"--pause-file \S+ ?", "", arguments)  # of the machine that ran it
    return " ".join(["python", PROGRAMS[program], arguments]).rstrip()


def result_of(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result
