"""Writes what the docs say about results from the result files, so that no figure is typed by hand.

    python docs/generators/make_pages.py

Some pages are written whole, some between markers: `written` has the list, and a module beside this one the text of
each. tests/docs holds them against the files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cost_page import cost_page
from derivatives_page import sweep_page, with_summary
from evidence_page import evidence
from faults_page import results as fault_results
from faults_page import with_tables as with_fault_tables
from help_page import help_page, runs_page
from imagenet_page import with_tables as with_imagenet_tables
from installations_page import with_installations
from matrix_page import matrix_page, memory_sentence
from reproduce_page import with_paper_tables
from scorecard_page import scorecard
from shared import RATIO, RESULTS, between, command, made, result_of, table, with_range
from trainer_page import TABLES, with_tables
from usb_page import with_table

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    for name, text in written().items():
        (ROOT / name).write_text(text, encoding="utf-8")


def written() -> dict[str, str]:
    """Every page that results have a part in: its path to what it should say."""
    guides = "docs/guides/"
    whole = {
        "docs/evidence.md": evidence,
        "docs/does-it-help.md": help_page,
        "docs/appendix/runs.md": runs_page,
        "docs/appendix/matrix.md": matrix,
        "docs/appendix/scorecard.md": scorecard,
        "docs/appendix/derivative-sweep.md": sweep_page,
        guides + "cost.md": cost,
    }
    between_markers: dict[str, Callable[[str], str]] = {
        "README.md": with_cost,
        "docs/installation.md": installation,
        "docs/torch-derivatives.md": with_summary,
        guides + "faults.md": lambda page: with_fault_tables(page, *fault_results()),
        guides + "imagenet.md": imagenet,
        guides + "reproduce-the-paper.md": lambda page: with_paper_tables(page, result_of("reproduce_demo")),
        guides + "trainer.md": lambda page: with_tables(page, trainer_results()),
        guides + "usb.md": lambda page: with_table(page, result_of("usb")),
    }
    parts = {name: write((ROOT / name).read_text(encoding="utf-8")) for name, write in between_markers.items()}
    return {name: write() for name, write in whole.items()} | parts


def installation(page: str) -> str:
    """The page on installing with fresh tables between its markers."""
    result = result_of("installations")
    return with_installations(page, result, made(result))


def imagenet(page: str) -> str:
    """The guide on the ImageNet trainer with fresh tables between its markers."""
    costs, runs = (
        [result_of(path.stem) for path in sorted(RESULTS.glob(f"imagenet_{kind}*.json"))] for kind in ("cost", "runs")
    )
    return with_imagenet_tables(page, costs, result_of("imagenet_equality"), runs)


def trainer_results() -> dict[str, dict[str, Any]]:
    """The result files of the trainer's page that exist."""
    return {name: result_of(name) for name in TABLES if (RESULTS / f"{name}.json").exists()}


def with_cost(readme: str) -> str:
    """The README with a fresh cost table between its markers."""
    return between(readme, "cost", cost_table(result_of("step_cost")))


def matrix() -> str:
    """The page of the matrix."""
    result, memory = result_of("matrix"), result_of("matrix_memory")
    return matrix_page(result, command(result), memory_sentence(memory, command(memory)))


def cost() -> str:
    """The page of what can be traded."""
    result = result_of("frontier")
    default = next(row for row in result_of("step_cost")["rows"] if row["variant"] == "default")
    return cost_page(result, default["ratio_median"], made(result), table)


def cost_table(result: dict[str, Any]) -> str:
    """Ratios to the step without the term on the wide residual network of the trainers: what a reader chooses among."""
    found = {row["variant"]: row for row in result["rows"] if row["model"] == "wrn-28-2"}
    rows = [with_range(found[variant]) | {"step": name} for variant, name in _README.items()]
    setting, threads = result["setting"], result["environment"]["threads"]
    columns = {"step": "step", **RATIO}
    return (
        f"{table(rows, columns)}\n\nBy the {setting['clock']} clock: WRN-28-2, 32x32, {setting['labeled']} labeled"
        f" images + {setting['pairs']} pairs, float32, {threads} CPU thread(s)."
    )


_README = {
    "without the term": "FixMatch",
    "default": "with the term, all pairs",
    "default, max_pairs=8": "with the term, 8 pairs",
    "vmap, chunk 16": "the same by `torch.func.vmap`, all pairs",
}


if __name__ == "__main__":
    main()
