"""What float32 is worth on whole networks: a section of docs/evidence.md."""

from __future__ import annotations

from typing import Any

from shared import command, table

_COLUMNS = {
    "network": "network", "pairs": "pairs", "choices": "choices:,", "flips": "flips:.1f",
    "cosine": "library_cosine_worst:.0e", "gradient": "library_gradient_worst:.0e",
    "loop: cosine": "loop_cosine_worst:.0e", "loop: gradient": "loop_gradient_worst:.0e",
    "held: cosine": "library_held_cosine_worst:.0e", "held: gradient": "library_held_gradient_worst:.0e",
    "loop held: cosine": "loop_held_cosine_worst:.0e", "loop held: gradient": "loop_held_gradient_worst:.0e",
    "draws in bounds": "within", "loop: in bounds": "loop_within",
}  # fmt: skip


def float32_section(result: dict[str, Any]) -> str:
    """Text and table.

    Args:
        result: of benchmarks/evidence/float32_error.py.

    Returns:
        Markdown.
    """
    rows = [row | _within(row) for row in result["rows"]]
    deep = next(row for row in rows if row["network"] == "wrn-28-2")
    held = {part: max(row[f"library_held_{part}_worst"] for row in rows) for part in ("cosine", "gradient")}
    return f"""Rounding alone costs at most {held["cosine"]:.0e} in a cosine and {held["gradient"]:.0e} in the term's
gradient on the networks below. **Kinks come on top.** ReLU, LeakyReLU and max pooling have a derivative that jumps.
Float32 moves a few inputs to the other side of a jump, and then gives the derivative of a neighbouring linear piece of
the network. WRN-28-2 makes {deep["choices"]:,} such choices for {deep["pairs"]} pairs. In float32
{deep["flips"]:.1f} of them flip on average. That alone costs up to {deep["library_cosine_worst"]:.0e} in a cosine and
{deep["library_gradient_worst"]:.0e} in the gradient. The plain float32 loop pays the same
({deep["loop_cosine_worst"]:.0e} and {deep["loop_gradient_worst"]:.0e}), because the network's own forward rounds.

So the bounds of the contract (2e-5 for a cosine, 2e-4 for the gradient) hold in float32 where nothing flips: with
smooth activations such as SiLU and GELU, and in most draws of shallow networks, but rarely in a deep ReLU network with
many pairs. With the choices held at those of float64, they hold in every row.

{table(rows, _COLUMNS)}

Worst of {result["setting"]["seeds"]} draws of weights and images (crops of photographs; normal noise for the
MLP and where it says so). Networks are freshly initialised and in train mode; the reference is the tests' float64 loop.
Choices: sides of activations and positions of maxima. Flips: mean over draws, in one float32 forward. "Loop" is
`engine="loop"` in float32. "Held": with the choices of a float64 forward. "In bounds": draws within 2e-5 and 2e-4.
Made by `{command(result)}` with torch {result["environment"]["torch"]} on a CPU."""


def _within(row: dict[str, Any]) -> dict[str, str]:
    count = len(row["seeds"])
    return {
        "within": f"{row['library_within_bounds']} of {count}",
        "loop_within": f"{row['loop_within_bounds']} of {count}",
    }
