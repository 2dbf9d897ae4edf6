"""The paper's tables, and ours, as a resumable grid of runs with paired seeds, each beside what the paper claims.

Examples:
    python reproduce.py --table main --budget demo
    python reproduce.py --table main ablation lambda curves --budget small --list
    python reproduce.py --table ablation --budget small --stop-after-minutes 60 -- --amp bf16 --data-dir data
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.claims import CLAIMS
from trainer.errors import OptionError
from trainer.launch import Parser, guarded
from trainer.statistics import FINAL

if TYPE_CHECKING:
    from trainer.grid import Cell, Grid


def parser() -> Parser:
    """The command line."""
    from trainer.grid import BUDGETS

    budgets = "; ".join(f"{name}: {budget.text}" for name, budget in BUDGETS.items())
    parser = Parser("reproduce.py", __doc__)
    parser.add_argument("--table", nargs="+", choices=list(CLAIMS), default=list(CLAIMS), help="default: all")
    parser.add_argument("--budget", choices=list(BUDGETS), default="demo", help=f"default: demo. {budgets}")
    parser.add_argument("--seeds", type=int, help="runs of each variant, seeds 0, 1, ...; default: the budget's")
    parser.add_argument("--output", type=Path, help="folder of the grid; default: runs/reproduce-BUDGET")
    parser.add_argument("--metric", choices=FINAL, default="last", help="test accuracy of a run; default: last")
    parser.add_argument("--list", action="store_true", help="show the cells with their states and times, and end")
    parser.add_argument("--only-tables", action="store_true", help="print the tables of what is finished; run nothing")
    parser.add_argument("--stop-after-minutes", type=float, help="stop then, with a checkpoint; repeat to continue")
    parser.add_argument("trainer", nargs="*", metavar="-- OPTION", help="options of fixmatch_cifar.py for every run")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the grid as far as it goes, then print and write the tables; the exit status is 1 where a cell failed."""
    return guarded(lambda: _run(parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    from trainer.files import write_atomically, write_json
    from trainer.grid import build_grid
    from trainer.gridrun import listing, run_grid, say
    from trainer.rundir import exclusive
    from trainer.tables import markdown, measure, text

    for name in ("seeds", "stop_after_minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise OptionError(f"--{name.replace('_', '-')} must be above 0; found {value}.")
    folder = options.output or Path(f"runs/reproduce-{options.budget}")
    grid = build_grid(folder, options.budget, options.table, options.seeds, options.trainer)
    if options.list:
        print(listing(grid))
        return 0
    grid.claim_grid()
    reason: str | None = None
    failed: list[Cell] = []
    if not options.only_tables:
        with exclusive(folder):
            reason, failed = run_grid(grid, options.stop_after_minutes)
    result = measure(grid, options.metric)
    write_json(folder / "tables.json", result)
    write_atomically(folder / "tables.md", lambda file: file.write(markdown(result).encode()))
    print(text(result))
    _draw(grid, folder / "curves.png")
    say(f"written: {folder / 'tables.json'}, {folder / 'tables.md'}; page of all runs: "
        f"python examples/report.py {folder / 'cells'}/*")  # fmt: skip
    if reason is not None:
        say(f"stopped by {reason}; start the same command again to continue.")
    for cell in failed:
        say(f"failed: {cell.folder.name}; see {folder / 'logs' / cell.folder.name}.log")
    return 1 if failed else {"SIGINT": 130, "SIGTERM": 143}.get(str(reason), 0)


def _draw(grid: Grid, path: Path) -> None:
    """The picture beside the table of curves."""
    from trainer.panels import accuracy_panel, draw_panel
    from trainer.runs import group_runs, read_run

    claim = CLAIMS["curves"]
    compared = [cell for cell in grid.cells if cell.variant in claim.rows.values() and cell.column in claim.columns]
    runs = [read_run(cell.folder) for cell in compared if cell.is_finished()]
    if "curves" in grid.tables and runs:
        draw_panel(accuracy_panel(group_runs(runs)), path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
