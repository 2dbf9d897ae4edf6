"""The page of the matrix, and its summary for the evidence page, from benchmarks/results/matrix.json."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from shared import APPENDIX

VERDICTS = ("pass", "dtype", "refused", "xfail", "wrong")


class Entry(NamedTuple):
    """One cell of the file: verdict, calls, and errors or a reason."""

    row: str
    precision: str
    engine: str
    verdict: str
    calls: int
    rest: str

    def error(self, column: int) -> float | None:
        """An error by its position among the quantities; None where there is none."""
        if self.verdict not in ("pass", "dtype"):
            return None
        word = self.rest.split()[column]
        return None if word == "-" else float(word)


COSINE, GRADIENT, OWN = 0, 2, 5


def entries(result: dict[str, Any]) -> list[Entry]:
    """Every cell of the file."""
    found = []
    for row, precisions in result["cells"].items():
        for precision, engines in precisions.items():
            for engine, text in engines.items():
                verdict, calls, rest = text.split(" ", 2)
                found.append(Entry(row, precision, engine, verdict, int(calls), rest))
    return found


def memory_sentence(result: dict[str, Any], command: str) -> str:
    """What was measured, in a separate run, of layers that remember something."""
    cells = entries(result)
    counts = Counter(cell.verdict for cell in cells)
    return (
        f"Layers that remember something from call to call ({', '.join(f'`{row}`' for row in result['cells'])}) were"
        f" measured later, by `{command}`: {len(cells)} cells, {counts['pass']} of them pass, {counts['refused']} are"
        f" refused as the row says, silently wrong: {counts['wrong']}."
    )


def matrix_page(result: dict[str, Any], command: str, memory: str) -> str:
    """docs/appendix/matrix.md."""
    cells = entries(result)
    environment, setting = result["environment"], result["setting"]
    precisions = list(result["bounds"])
    counts = Counter(cell.verdict for cell in cells)
    verdicts: dict[str, set[str]] = {}
    for cell in cells:
        verdicts.setdefault(cell.row, set()).add(cell.verdict)
    passing = {row for row, found in verdicts.items() if found == {"pass"}}
    known = "\n\n".join(
        f"**{zoo.capitalize()}**: " + ", ".join(f"`{row}`" for row in rows if row in passing) + "."
        for zoo, rows in result["zoos"].items()
    )
    others = [row for rows in result["zoos"].values() for row in rows if row not in passing]
    names = ", ".join(f"`{row}`" for row in result["skipped"])
    skipped = f"Not run, because their package was not installed: {names}.\n\n" if names else ""
    return f"""{APPENDIX}# Exactness of every model and layer tried

Written by `python docs/generators/make_pages.py` from `benchmarks/results/matrix.json`, which has the errors of every
cell. That file was made by `{command}` with torch {environment["torch"]} on a CPU.
**{len(cells)} cells, {sum(c.calls for c in cells)} calls; silently wrong: {counts["wrong"]}.**

{memory}

A cell is a row (a model or a layer), an engine and a precision. Its calls, with `fused` on and off and different
chunks, are compared in five quantities with a float64 loop over samples that shares no code with the library: the
cosine of each pair, L_g, its derivative for the parameters, both norms, and its derivative for the inputs.
{setting["pairs"]} pairs; whole models {setting["pairs of whole models"]}.

| verdict | meaning | cells |
| --- | --- | ---: |
| pass | inside the bounds below | {counts["pass"]} |
| dtype | beyond them, and so is the oracle itself in that precision | {counts["dtype"]} |
| refused | an error that names the layer | {counts["refused"]} |
| wrong | anything else | {counts["wrong"]} |

Verdict dtype allows 3 times the oracle's own error in float32, and twice that error in half precision. The oracle's
error is the worst of at most eight draws of the rounding noise.

{bounds_table(result)}

In float32 a deep ReLU network may be further off than that, with any engine:
[why, and how far](../evidence.md#float32-on-whole-networks).

## By engine and precision

{summary_table(result)}

## Refused

{refusals_table(cells)}

{skipped}## Rows in which every cell passes: {len(passing)} of {len(verdicts)}

{known}

## The other rows, and how many of the engines do not pass

{others_table(others, cells, precisions)}
"""


def bounds_table(result: dict[str, Any]) -> str:
    """What each precision is held against."""
    lines = [
        "| precision | cosine | gradient, norms, inputs | direction of the gradient |",
        "| --- | ---: | ---: | ---: |",
    ]
    for precision, bound in result["bounds"].items():
        gradient = "beside the oracle" if bound["gradient"] is None else f"{bound['gradient']:.0e}"
        direction = "" if bound["direction"] is None else f"1 - cos <= {bound['direction']:.0e}"
        lines.append(f"| {precision} | {bound['cosine']:.0e} | {gradient} | {direction} |")
    return "\n".join(lines)


def summary_table(result: dict[str, Any]) -> str:
    """Counts and worst errors by engine and precision."""
    cells = entries(result)
    lines = [
        "| engine | precision | pass | dtype | refused | wrong | worst cosine error | worst gradient error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for engine in dict.fromkeys(cell.engine for cell in cells):
        for precision in result["bounds"]:
            counts, worst = _summary(cells, engine, precision)
            shown = " | ".join(str(counts[verdict]) for verdict in ("pass", "dtype", "refused", "wrong"))
            lines.append(f"| {engine} | {precision} | {shown} | {worst[0]:.0e} | {worst[1]:.0e} |")
    lines += ["", "Worst errors are those of the cells that pass."]
    return "\n".join(lines)


def precision_table(result: dict[str, Any]) -> str:
    """The same of the default engine."""
    cells = entries(result)
    lines = [
        "| precision | pass | as the oracle | refused | wrong | worst gradient error |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for precision in result["bounds"]:
        counts, worst = _summary(cells, "auto", precision)
        shown = " | ".join(str(counts[verdict]) for verdict in ("pass", "dtype", "refused", "wrong"))
        lines.append(f"| {precision} | {shown} | {worst[1]:.0e} |")
    return "\n".join(lines)


def _summary(cells: list[Entry], engine: str, precision: str) -> tuple[Counter[str], list[float]]:
    """Verdicts, and the worst error of cosine and gradient among the cells that pass."""
    mine = [cell for cell in cells if (cell.engine, cell.precision) == (engine, precision)]
    passed = [cell for cell in mine if cell.verdict == "pass"]
    worst = [max((cell.error(column) or 0.0 for cell in passed), default=0.0) for column in (COSINE, GRADIENT)]
    return Counter(cell.verdict for cell in mine), worst


def refusals_table(cells: list[Entry]) -> str:
    """Each refusal once, with the class of its error."""
    reasons: dict[str, list[Entry]] = {}
    for cell in cells:
        if cell.verdict in ("refused", "xfail"):
            reasons.setdefault(cell.rest, []).append(cell)
    lines = ["| class | message | rows | engines | cells |", "| --- | --- | --- | --- | ---: |"]
    for reason, mine in sorted(reasons.items(), key=lambda item: -len(item[1])):
        kind, _, message = reason.partition(": ")
        rows = sorted({cell.row for cell in mine})
        shown = ", ".join(rows[:2]) + (f" and {len(rows) - 2} more" if len(rows) > 2 else "")
        engines = ", ".join(dict.fromkeys(cell.engine for cell in mine))
        text = message[:90].replace("|", "/").replace("`", "").replace("<", "&lt;")
        lines.append(f"| {kind} | {text} | {shown} | {engines} | {len(mine)} |")
    return "\n".join(lines)


def others_table(rows: list[str], cells: list[Entry], precisions: list[str]) -> str:
    """By precision, how many engines do not pass, and what they do instead."""
    lines = ["| row | " + " | ".join(precisions) + " |", "| --- |" + " --- |" * len(precisions)]
    for row in rows:
        shown = []
        for precision in precisions:
            mine = [cell for cell in cells if (cell.row, cell.precision) == (row, precision)]
            counts = Counter(cell.verdict for cell in mine)
            shown.append(", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v] and v != "pass"))
        lines.append(f"| `{row}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)
