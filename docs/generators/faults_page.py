"""The tables of docs/guides/faults.md from the results of kills.py and hostile_files.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared import between, command

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

_PARTS = {
    "random": "at moments uniform in the time of a run",
    "save": "aimed into a save, on a slow disk",
    "operations": "just before each change of a file, and each fsync, of a whole run",
    "processes": "one of two processes (ImageNet trainer, gloo)",
    "torchrun": "one of two processes under `torchrun --max-restarts 3`",
    "cold": "at moments uniform in the time of the program from its start, imports included",
}
_FILES = {
    "truncated": "cut", "flipped": "flipped", "pickles": "forged", "archives": "forged", "data": "data",
    "fuzz": "fuzz", "mismatch": "mismatch", "not finite": "not finite", "places": "odd places", "full": "disk full",
}  # fmt: skip


def with_tables(page: str, kills: dict[str, Any], hostile: dict[str, Any]) -> str:
    """The page with fresh tables between its markers."""
    tables = {"kills": kills_table(kills), "control": control_table(kills), "hostile": hostile_table(hostile)}
    for name, text in tables.items():
        page = between(page, name, text)
    return page


def kills_table(result: dict[str, Any]) -> str:
    """By part: kills, and runs that are equal."""
    parts = {row["part"]: row for row in result["parts"]}
    rows = [
        [_PARTS[name], row["kills"], row["inside a save"], row["before the first checkpoint"],
         f"{row['equal']} of {row['runs']}"]
        for name in _PARTS if (row := parts.get(name)) is not None
    ]  # fmt: skip
    total = [sum(row[column] for row in rows) for column in (1, 2, 3)]
    equal, runs = (sum(row[name] for row in parts.values()) for name in ("equal", "runs"))
    rows.append(["**in all**", *total, f"{equal} of {runs}"])
    head = ["SIGKILL", "kills", "inside a save", "before a checkpoint", "equal runs"]
    return f"{_table(head, rows)}\n\n{_made(result)}"


def control_table(result: dict[str, Any]) -> str:
    """How many items were noticed, and which were tried."""
    if not result["control"]:
        return "Not run on these sources yet: `python tests/slow/kills.py --only control`."
    forgotten = [row for row in result["control"] if row["item"] != "nothing"]
    noticed = sum(row["noticed"] for row in forgotten)
    items = ", ".join(f"`{row['item']}`" for row in forgotten)
    return f"{noticed} of {len(forgotten)} items noticed: {items}."


def hostile_table(result: dict[str, Any]) -> str:
    """By kind of damage: what was damaged, cases, and those answered as they should be."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        parts.setdefault(_FILES[row["part"]], []).append(row)
    rows = [
        [part, ", ".join(dict.fromkeys(row["row"].removeprefix("fuzz, ") for row in mine)),
         f"{sum(row['right'] for row in mine)} of {sum(row['cases'] for row in mine)}"]
        for part, mine in parts.items()
    ]  # fmt: skip
    return f"{_table(['damage', 'to what', 'answered as it should be'], rows)}\n\n{_made(result)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def _made(result: dict[str, Any]) -> str:
    environment = result["environment"]
    program = " ".join(command(result).split(" ")[:2])
    return f"Made by `{program}`: torch {environment['torch']}, {environment['device']}."


def results() -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two programs found."""
    kills, hostile = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("kills", "hostile_files"))
    return kills, hostile
