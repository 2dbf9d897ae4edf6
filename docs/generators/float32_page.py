"""What float32 is worth on whole networks: a section of docs/evidence.md."""

from __future__ import annotations

from typing import Any

from shared import command, table

_COLUMNS = {
    "network": "network", "flips": "flips:.1f", "cosine": "library_cosine_worst:.0e",
    "gradient": "library_gradient_worst:.0e", "plain loop: gradient": "loop_gradient_worst:.0e",
    "held: gradient": "library_held_gradient_worst:.0e",
}  # fmt: skip


def float32_section(result: dict[str, Any]) -> str:
    """Text and table.

    Args:
        result: of benchmarks/evidence/float32_error.py.

    Returns:
        Markdown.
    """
    rows = result["rows"]
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

Worst of {result["setting"]["seeds"]} draws of weights and images. Flips: mean over draws, in one float32 forward.
"Held": with the choices of a float64 forward. Made by `{command(result)}` with torch {result["environment"]["torch"]}
on a CPU."""
