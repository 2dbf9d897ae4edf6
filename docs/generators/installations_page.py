"""The tables of docs/installation.md from benchmarks/results/installations.json."""

from __future__ import annotations

from typing import Any

from shared import between

Result = dict[str, Any]


def with_installations(page: str, result: Result, made: str) -> str:
    """The page with a fresh table between its markers."""
    return between(page, "installations", installations(result, made))


def installations(result: Result, made: str) -> str:
    """By row: what was installed, how large it was, and what its tests said; then the two files' sizes."""
    lines = [
        "| installed | Python | torch | environment | what was run | said |",
        "| --- | --- | --- | ---: | --- | --- |",
    ]
    for row in result["rows"]:
        what = f"{row['what']}, `[{row['extra']}]`" if row["extra"] else row["what"]
        size = f"{row['MB'] / 1000:.1f} GB" if "MB" in row else "-"
        # The closing line of pytest; other programs end otherwise.
        said = row["said"] if " passed" in row["said"] else "ended without an error"
        verdict = said if row["passed"] else f"**failed**: {row['said']}"
        lines.append(f"| {what} | {row['python']} | {row.get('torch', '-')} | {size} | {row['ran']} | {verdict} |")
    sizes = "; ".join(f"`{built['file']}` {built['kB']:,} kB, {built['files']} files" for built in result["built"])
    names = ", ".join(next(row["packages"] for row in result["rows"] if row["torch"].endswith("+cpu")))
    return "\n".join(
        [*lines, "", f"{sizes}.", "", f"The package alone, beside a torch for CPUs, brings: {names}.", "", made]
    )
