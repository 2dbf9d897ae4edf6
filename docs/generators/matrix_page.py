"""The page of the matrix, and its summary for the evidence page, from benchmarks/results/matrix.json."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

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
    """What was measured of layers that remember something, in a run of their own."""
    cells = entries(result)
    counts = Counter(cell.verdict for cell in cells)
    return (
        f"Layers that remember something from call to call ({', '.join(f'`{row}`' for row in result['cells'])}) were"
        f" measured later, by `{command}`: {len(cells)} cells, {counts['pass']} of them pass, {counts['refused']} are"
        f" refused as the row says, silently wrong: {counts['wrong']}."
    )


def matrix_page(result: dict[str, Any], command: str, memory: str) -> str:
    """docs/matrix.md."""
    cells = entries(result)
    environment, setting = result["environment"], result["setting"]
    precisions = list(result["bounds"])
    counts = Counter(cell.verdict for cell in cells)
    parts = [
        f"""# The matrix: modules, engines, precisions

This page is written by `python docs/generators/make_pages.py` from `benchmarks/results/matrix.json`, which was made by
`{command}` with torch {environment["torch"]} on a CPU. **{len(cells)} cells, {sum(c.calls for c in cells)} calls;
silently wrong: {counts["wrong"]}.**

{memory}

A cell is a row (a model or a layer), an engine and a precision. Its calls, with `fused` on and off and different
chunks, are compared in five quantities with a float64 loop over samples that shares no code with the library: the
cosine of each pair, L_g, its derivative for the parameters, both norms, and its derivative for the inputs (which
`fused=False` gives; `fused=True` refuses inputs that require grad). {setting["pairs"]} pairs; whole models
{setting["pairs of whole models"]}.

| verdict | meaning | cells |
| --- | --- | ---: |
| pass | inside the bounds of the contract | {counts["pass"]} |
| dtype | beyond them, and so is the oracle itself in that precision | {counts["dtype"]} |
| refused | by name, as the row says | {counts["refused"]} |
| xfail | a known bug of torch | {counts["xfail"]} |
| wrong | anything else | {counts["wrong"]} |
| | not measured yet | {len(result["cells"]) * len({c.engine for c in cells}) * len(precisions) - len(cells)} |

Verdict dtype allows 3 times the oracle's own error in float32; in half precision every cell is held to twice that error
and a few units in the last place. The oracle's error is the worst of at most eight draws of the rounding noise: one as
the problem is, and further ones with parameters and inputs changed by a rounding error, where the first does not
explain what an engine is off.

{bounds_table(result)}

In float32 a deep ReLU network may be further off than that, with any engine:
[why, and how far](evidence.md#float32-on-whole-networks).

## By engine and precision

{summary_table(result)}

## Refused

{refusals_table(cells)}
""",
    ]
    if result["skipped"]:
        names = ", ".join(f"`{row}`" for row in result["skipped"])
        parts.append(f"## Skipped\n\nRows whose package was not installed: {names}.\n")
    parts.append(
        f"""## Rows

The worst relative error of the parameter gradient, by precision: {" / ".join(precisions)}. A star: beyond the bound of
the contract, as the oracle in that precision is (verdict dtype). `ref`: refused. A dash: not measured.
"""
    )
    for zoo, rows in result["zoos"].items():
        parts.append(f"### {zoo.capitalize()}\n\n{rows_table(rows, cells, precisions)}\n")
    return "\n".join(parts)


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
        "| engine | precision | rows | calls | "
        + " | ".join(VERDICTS)
        + " | worst cosine error | worst gradient error |",
        "| --- | --- |" + " ---: |" * (len(VERDICTS) + 4),
    ]
    for engine in dict.fromkeys(cell.engine for cell in cells):
        for precision in result["bounds"]:
            mine = [cell for cell in cells if (cell.engine, cell.precision) == (engine, precision)]
            if not mine:
                continue
            counts = Counter(cell.verdict for cell in mine)
            passed = [cell for cell in mine if cell.verdict == "pass"]
            worst = [max((cell.error(column) or 0.0 for cell in passed), default=0.0) for column in (COSINE, GRADIENT)]
            lines.append(
                f"| {engine} | {precision} | {len(mine)} | {sum(cell.calls for cell in mine)} | "
                + " | ".join(str(counts[verdict]) for verdict in VERDICTS)
                + f" | {worst[0]:.1e} | {worst[1]:.1e} |"
            )
    lines += ["", "Worst errors are those of the cells that pass; the others are in the rows below."]
    return "\n".join(lines)


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
        shown = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
        engines = ", ".join(dict.fromkeys(cell.engine for cell in mine))
        text = message[:120].replace("|", "/").replace("`", "").replace("<", "&lt;")
        lines.append(f"| {kind} | {text} | {shown} | {engines} | {len(mine)} |")
    return "\n".join(lines)


def rows_table(rows: list[str], cells: list[Entry], precisions: list[str]) -> str:
    """Rows by engines, the precisions inside."""
    known = {(cell.row, cell.engine, cell.precision): cell for cell in cells}
    engines = list(dict.fromkeys(cell.engine for cell in cells))
    lines = ["| row | " + " | ".join(engines) + " |", "| --- |" + " --- |" * len(engines)]
    for row in rows:
        shown = [" / ".join(_shown(known.get((row, engine, p))) for p in precisions) for engine in engines]
        lines.append(f"| `{row}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _shown(cell: Entry | None) -> str:
    if cell is None:
        return "-"
    if cell.verdict in ("pass", "dtype"):
        return f"{cell.error(GRADIENT) or 0.0:.0e}" + ("*" if cell.verdict == "dtype" else "")
    return {"refused": "ref", "xfail": "xfail", "wrong": "**wrong**"}[cell.verdict]
