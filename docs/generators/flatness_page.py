"""The section of the evidence page on flatness, written from its result file."""

from __future__ import annotations

import statistics
from typing import Any

_QUANTITIES = {
    "accuracy": "test accuracy",
    "sharpness": "sharpness, one step",
    "sharpness_5": "sharpness, five steps",
    "eigenvalue": "top eigenvalue",
    "gc": "mean GC",
}


def flatness_section(result: dict[str, Any], made: str) -> str:
    """Tables and their words; every claim in them is computed from the rows."""
    rows, setting = result["rows"], result["setting"]
    count = setting["seeds"]
    vacuous = sum(row["vacuous"] for row in rows), sum(row["vacuous_by_pair"] for row in rows)
    covered = statistics.mean(row["covered_by_pair"] for row in rows)
    broken = sum(not row["holds"] for row in rows)
    worst = max(row["residual"] for row in rows)
    return f"""A small convolutional network on scikit-learn's digits, {setting["steps"]} steps with 40 labels,
{count} seeds. Afterwards, in eval mode: sharpness within a ball of radius 0.05 and the top eigenvalue of the Hessian,
of the mean loss on {setting["images"]} training images with their true labels; mean GC and Proposition 1 on
{setting["pairs"]} pairs of views.

Differences to FixMatch, seed by seed (largest residual of an eigenvalue {worst:.0e}):

{_differences(result["differences"])}

{_verdict(result["differences"], count)}

**Proposition 1.** With one L for all pairs the bound says nothing (it is -1 or less) in {vacuous[0]} of {len(rows)}
networks, with each pair's own L in {vacuous[1]}; {covered:.0%} of the pairs are near enough for
[what is proved](theory.md#proposition-1). The mean GC is below the bound with each pair's L in {broken} of {len(rows)}
networks.

{made}"""


def _differences(differences: list[dict[str, Any]]) -> str:
    lines = ["| quantity | mean difference | each |", "| --- | ---: | --- |"]
    for row in differences:
        each = ", ".join(f"{value:+.4f}" for value in row["each"])
        lines.append(f"| {_QUANTITIES[row['quantity']]} | {row['mean']:+.4f} | {each} |")
    return "\n".join(lines)


def _verdict(differences: list[dict[str, Any]], seeds: int) -> str:
    said, flat = [], []
    for row in differences:
        if row["quantity"] in ("sharpness", "eigenvalue", "gc"):
            signs = {value > 0 for value in row["each"]}
            way = ("higher" if signs == {True} else "lower") + " in every seed" if len(signs) == 1 else "mixed"
            said.append(f"{_QUANTITIES[row['quantity']]}, {way}")
            flat += [way == "lower in every seed"] if row["quantity"] != "gc" else []
    verdict = "flatter in every seed" if all(flat) else "not flatter throughout" if any(flat) else "not flatter"
    return (
        f"**With the term these minima are {verdict}** ({'; '.join(said)}). {seeds} seeds of one small network, at one"
        " weight of the term, show a tendency at most."
    )
