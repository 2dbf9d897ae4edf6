"""Runs against each other, finished or not: one self-contained HTML page, or one picture.

Runs that differ in their seed alone are drawn as one curve with a band. The others are compared with the group of the
first run.

Examples:
    python report.py runs/a runs/b runs/c
    python report.py runs/a runs/b --output comparison.html --png
    python report.py runs/a runs/b --output curves.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import OptionError
from trainer.launch import Parser, guarded


def main(arguments: Sequence[str]) -> int:
    """Read the runs, print the table, write the page or the picture; returns the exit status."""
    parser = Parser("report.py", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory (--output of a trainer)")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE",
        help="FILE.html: the page; FILE.png: the accuracy curves alone; default: report.html",
    )  # fmt: skip
    parser.add_argument("--png", action="store_true", help="beside the page, each of its pictures as FILE-NAME.png")
    parser.add_argument("--title", help="title; default: what the runs have in common")
    options = parser.parse_args(arguments)
    return guarded(lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    from trainer.files import write_atomically
    from trainer.page import page
    from trainer.panels import draw_curves, draw_panel, panels, shared_title, table
    from trainer.runs import group_runs, read_run

    output: Path = options.output
    if output.suffix not in {".html", ".png"}:
        raise OptionError(f"--output {output}: the name must end in .html (the page) or .png (the curves).")
    if options.png and output.suffix != ".html":
        raise OptionError(f"--png draws the pictures of a page, but --output is {output}: give a name in .html.")
    runs = [read_run(folder) for folder in options.runs]
    groups = group_runs(runs)
    print(table(runs))
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".png":
        draw_curves(runs, output, title=options.title)
        print(f"curves: {output}")
        return 0
    text = page(groups, title=options.title or shared_title(runs) or "Runs")
    write_atomically(output, lambda file: file.write(text.encode(errors="backslashreplace")))
    print(f"page: {output}")
    for panel in panels(groups) if options.png else ():
        picture = output.with_name(f"{output.stem}-{panel.key}.png")
        draw_panel(panel, picture)
        print(f"picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
