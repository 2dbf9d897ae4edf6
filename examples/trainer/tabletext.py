"""A record of tables as text for a terminal and as Markdown."""

from __future__ import annotations

import textwrap
from typing import Any

from trainer.runlog import aligned, shown


def text(result: dict[str, Any]) -> str:
    """The tables for a terminal."""
    parts = [_wrapped(_head(result))]
    for name, table in result["tables"].items():
        below = [_wrapped(line) for line in _below(table)]
        parts.append("\n".join([f"\n{name}: {_caption(table)}", "", *aligned(_cells(table)), *below]))
    return "\n".join(parts)


def _wrapped(lines: str) -> str:
    return "\n".join(textwrap.fill(line, 110, break_on_hyphens=False) for line in lines.split("\n"))


def markdown(result: dict[str, Any], *, level: int = 2) -> str:
    """The tables in Markdown."""
    parts = [_head(result)]
    for table in result["tables"].values():
        cells = _cells(table)
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        lines.insert(1, "| --- |" + " ---: |" * (len(cells[0]) - 1))
        parts.append("\n".join([f"\n{'#' * level} {_caption(table)}", "", *lines, *_below(table)]))
    return "\n".join(parts) + "\n"


def _head(result: dict[str, Any]) -> str:
    lines = [f"Budget {result['budget']}: {result['finished']} of {result['cells']} runs finished."]
    for column, protocol in result["protocol"].items():
        options, differs = protocol["options"], protocol["differs"]
        unlabeled = options["batch_size"] * options["unlabeled_ratio"]
        lines.append(
            f"\n{column}: {options['dataset']} with {options['labels']} labels, {options['arch']}, "
            f"{options['steps']:,} steps of {options['batch_size']} + {unlabeled} images."
        )
        if differs:
            changes = "; ".join(
                f"{name} {shown(here)} (paper: {shown(paper)})" for name, (paper, here) in differs.items()
            )
            lines.append(f"This is not the paper's protocol: {changes}.")
        else:
            lines.append("This is the paper's protocol, as far as the paper states it.")
    lines.append(
        f"\nAccuracy: {result['metric']} of the averaged model on the test images, in per cent, mean ± standard "
        f"deviation over seeds (n). Differences are paired by seed, in points, with Student's "
        f"{100 * result['confidence']:.0f} % interval. The paper's numbers are claims: no run behind them is known."
    )
    made = "; ".join(", ".join(f"{key} {shown(value)}" for key, value in e.items()) for e in result["environments"])
    return "\n".join([*lines, f"\nMade with {made}."] if made else lines)


def _caption(table: dict[str, Any]) -> str:
    source = f"the paper's {table['label']}" if table["label"] else "not in the paper"
    return f"{table['caption']} ({source})"


def _below(table: dict[str, Any]) -> list[str]:
    lines = [f"{column} is not run: {reason}." for column, reason in table["absent"].items()]
    lines += [f"The paper claims: “{table['claim']}”"] if table["claim"] else []
    lines += [table["note"]] if table["note"] else []
    return ["", *lines] if lines else []


def _cells(table: dict[str, Any]) -> list[list[str]]:
    if table["claim"]:
        return _curve_cells(table)
    reference, several = table["reference"], len({row["column"] for row in table["rows"]}) > 1
    if not table["label"]:
        return _own_cells(table, several=several)
    cells = [
        ["row", *(["column"] if several else []), "claim", "here", "here - claim", f"here - {reference}",
         f"claim - {reference}", "claim in interval"]
    ]  # fmt: skip
    for row in table["rows"]:
        if row["column"] in table["absent"]:
            continue
        holds = {True: "yes", False: "no", None: "-"}[row["interval_holds_claim"]]
        cells.append(
            [row["row"], *([row["column"]] if several else []), f"{row['claim']:.1f}", spread_text(row["measured"]),
             _signed(row["deviation"]), difference_text(row["difference"]), _signed(row["claimed_difference"]), holds]
        )  # fmt: skip
    return cells


def _own_cells(table: dict[str, Any], *, several: bool) -> list[list[str]]:
    cells = [["row", *(["column"] if several else []), "here", f"here - {table['reference']}"]]
    for row in table["rows"]:
        column = [row["column"]] if several else []
        cells.append([row["row"], *column, spread_text(row["measured"]), difference_text(row["difference"])])
    return cells


def _curve_cells(table: dict[str, Any]) -> list[list[str]]:
    reference = table["reference"]
    at = [f"at {share:.0%}" for share, _ in table["rows"][0]["at"]]
    cells = [["row", *at, "mean of the curve", f"- {reference}", "steps to the common level", f"- {reference}"]]
    for row in table["rows"]:
        heights = ["-" if value is None else f"{value:.1f}" for _, value in row["at"]]
        cells.append(
            [row["row"], *heights, spread_text(row["over_run"]), difference_text(row["difference"]),
             spread_text(row["steps_to_level"], digits=0), difference_text(row["steps_difference"], digits=0)]
        )  # fmt: skip
    return cells


def spread_text(numbers: dict[str, Any] | None, *, digits: int = 1) -> str:
    """Mean, deviation and number: `57.1 ± 1.2 (5)`; a dash for None."""
    if numbers is None:
        return "-"
    deviation = "" if numbers["sd"] is None else f" ± {numbers['sd']:.{digits}f}"
    return f"{numbers['mean']:.{digits}f}{deviation} ({numbers['n']})"


def difference_text(numbers: dict[str, Any] | None, *, digits: int = 1) -> str:
    """Mean difference, interval and number: `+0.3 [-1.2, +1.8] (5)`; a dash for None."""
    if numbers is None:
        return "-"
    interval = ""
    if numbers["low"] is not None:
        interval = f" [{_signed(numbers['low'], digits=digits)}, {_signed(numbers['high'], digits=digits)}]"
    return f"{_signed(numbers['mean'], digits=digits)}{interval} ({numbers['n']})"


def _signed(value: float | None, *, digits: int = 1) -> str:
    return "-" if value is None else f"{round(value, digits) + 0.0:+.{digits}f}"  # 0.0 instead of -0.0
