"""docs/appendix/derivative-sweep.md, and the counts of docs/torch-derivatives.md, from `sweep_derivatives.py`."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from shared import APPENDIX, between, command

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TORCH = ("first", "second", "loop", "vmap", "batched", "float32")
ENGINES = ("gradconsist loop", "gradconsist vmap", "gradconsist ghost", "gradconsist float32")
RIGHT = {"verdict": "right"}
# What counts most where several engines are one column.
ORDER = ("wrong", "raises", "right", "refused", "-")


def sweeps() -> dict[str, dict[str, Any]]:
    """Results of the sweep by torch's version, oldest first."""
    found = {}
    for path in RESULTS.glob("sweep_derivatives_torch*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            row["cells"] = {column: row["not_right"].get(column, RIGHT) for column in (*TORCH, *ENGINES)}
        found[result["environment"]["torch"].partition("+")[0]] = result
    return dict(sorted(found.items(), key=lambda item: [int(part) for part in item[0].split(".")]))


def with_summary(page: str) -> str:
    """The page on torch's derivatives with fresh counts between its markers."""
    lines = [
        "| torch | layers and functions | torch wrong somewhere | torch raises somewhere | the library wrong | names of"
        " torch.nn not run |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for version, result in sweeps().items():
        rows = result["rows"]
        raises = sum(any(row["cells"][column]["verdict"] == "raises" for column in TORCH) for row in rows)
        wrong, uncovered = result["wrong"], len(result["uncovered"])
        lines.append(
            f"| {version} | {len(rows)} | {len(wrong['torch'])} | {raises} | {len(wrong['library'])} | {uncovered} |"
        )
    return between(page, "sweep", "\n".join(lines))


def sweep_page() -> str:
    """The whole page of the sweep."""
    found = sweeps()
    names = list(dict.fromkeys(row["name"] for result in found.values() for row in result["rows"]))
    cells = {version: {row["name"]: row["cells"] for row in result["rows"]} for version, result in found.items()}
    right = [name for name in names if all(_is_right(of[name]) for of in cells.values() if name in of)]
    lines = [
        "| layer or function | " + " | ".join(TORCH) + " | the library's engines |",
        "| --- |" + " --- |" * (len(TORCH) + 1),
    ]
    alike: dict[str, list[str]] = {}  # what is the same for several layers, to their names
    for name in names:
        if name not in right:
            per_version = {version: of[name] for version, of in cells.items() if name in of}
            columns = [_joined({v: _text(c[column]) for v, c in per_version.items()}) for column in TORCH]
            columns.append(_joined({v: _engines(c) for v, c in per_version.items()}))
            alike.setdefault(" | ".join(columns), []).append(f"`{name}`")
    lines += [f"| {', '.join(layers)} | {columns} |" for columns, layers in alike.items()]
    error = max(row["error"] for result in found.values() for row in result["rows"])
    wrong = [c for of in cells.values() for row in of.values() for c in row.values() if c["verdict"] == "wrong"]
    seen = min(cell["error"] for cell in wrong if "error" in cell)
    bound = next(iter(found.values()))["tolerance"]
    versions = ", ".join(found)
    return f"""{APPENDIX}# Torch's derivatives, layer by layer

Written by `python docs/generators/make_pages.py` from what `python benchmarks/derivatives/sweep_derivatives.py` found
with torch {versions}, in float64 on a CPU. What is wrong, and a script for each, is on
[another page](../torch-derivatives.md).

- **first**, **second**: gradcheck and gradgradcheck of the layer, in its input and parameters.
- **loop**: the derivative of ⟨g_w, g_s⟩, |g_w|² and |g_s|² of per-sample gradients by autograd, twice, a sample at a
  time.
- **vmap**: the same by `torch.func.vmap(grad)`, differentiated from outside.
- **batched**: the same by a forward under `vmap`, differentiated twice from outside.
- **float32**: the loop in float32 against float64.
- **the library's engines**: the gradient of L_g by loop, vmap and ghost, and by the default engine in float32.

Truth for all but the first two are central differences, which rest on plain first derivatives of single samples. A
right cell is off by {error:.0e} at most, a wrong one by {seen:.0e} at least (relative to what a random direction sees
of the gradient); the bound between them is {bound:.0e}. "raises" is an error of torch's own, "refused" one that names
the module or the operation and says what to do. Rows that changed after a run were run again alone; the files name
them.

## Not right everywhere

{chr(10).join(lines)}

## Right everywhere: {len(right)} of {len(names)}

Variants of one layer are counted: {_counted(right)}.

{_directional()}
"""


def _counted(names: list[str]) -> str:
    """Each layer once, with the number of its variants: `nn.Conv1d` (7)."""
    counts = Counter(re.split(r"[(,]", name)[0].strip() for name in names)
    return ", ".join(f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in counts.items())


def _is_right(cells: dict[str, Any]) -> bool:
    return all(cell["verdict"] in ("right", "-") for cell in cells.values())


def _text(cell: dict[str, Any]) -> str:
    return "**wrong**" if cell["verdict"] == "wrong" else str(cell["verdict"])


def _joined(texts: dict[str, str]) -> str:
    """One text where versions agree; else each with its versions."""
    groups: dict[str, list[str]] = {}
    for version, text in texts.items():
        groups.setdefault(text, []).append(version)
    if len(groups) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{text} ({', '.join(versions)})" for text, versions in groups.items())


def _engines(cells: dict[str, Any]) -> str:
    verdicts = {column.removeprefix("gradconsist "): cells[column]["verdict"] for column in ENGINES}
    engines = {name: verdict for name, verdict in verdicts.items() if verdict != "-"}
    groups: dict[str, list[str]] = {}
    for name, verdict in engines.items():
        groups.setdefault(verdict, []).append(name)
    if len(groups) <= 1:
        return next(iter(groups), "-")
    ordered = sorted(groups, key=ORDER.index)
    return "; ".join(f"{verdict}: {', '.join(groups[verdict])}" for verdict in ordered)


def _directional() -> str:
    path = RESULTS / "directional.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [*result["smooth"], *result["kinked"]]
    worst = max(row["max"] for row in rows)
    return f"""## Whole models

The gradient of L_g along random directions against differences of the oracle's value, on {len(rows)} models: off by
{worst:.0e} at most (bound {result["bound"]:.0e}). {len(result["kinked"])} of them have kinks; directions that cross one
are left out.

Made by `{command(result)}` with torch {result["environment"]["torch"]}.
"""
