"""Which sequence models run in one batch: a section of docs/evidence.md."""

from __future__ import annotations

from typing import Any

from shared import command


def sequence_section(result: dict[str, Any]) -> str:
    """Text and table.

    Args:
        result: of tests/slow/sequence_models.py.

    Returns:
        Markdown.
    """
    environment, rows = result["environment"], result["rows"]
    exact = [row for row in rows if "gradient_error" in row]
    batched = sum(row["runs"] == "one batch" for row in rows)
    others = "; ".join(f"{row['model']}: {row['runs']}, {_why(row)}" for row in rows if row["runs"] != "one batch")
    models = "; ".join(row["model"] for row in rows if row["runs"] == "one batch")
    return f"""{batched} of {len(rows)} models of transformers {environment["transformers"]} (LoRA by peft
{environment["peft"]}) run in one batch, with a padding mask that pads some samples. Loss and gradient are compared with
a plain loop of `torch.autograd.grad` in float64; the largest relative error of a gradient is
{max(row["gradient_error"] for row in exact):.0e}. Models are small and random.

{models}. Not in one batch: {others}.

Made by `{command(result)}`, torch {environment["torch"]}."""


def _why(row: dict[str, Any]) -> str:
    """Why a model does not run in one batch, in a few words."""
    said = " ".join([row.get("says", ""), *row.get("reasons", [])])
    if "setup_context" in said:
        return "a custom Function without `setup_context`"
    if "reentrant checkpointing" in said:
        return "reentrant checkpoints: pass `use_reentrant=False`"
    return said.strip().replace("|", "/")
