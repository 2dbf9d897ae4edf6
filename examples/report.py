"""Draw finished or running runs against each other and print a table.

Example:
    python report.py runs/a runs/b runs/c --output curves.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.errors import TrainerError
from recipes.plotting import draw_curves, read_run, table


def main(arguments: Sequence[str]) -> int:
    """Read the runs, print the table, write the picture.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory (--output of a trainer)")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), metavar="FILE.png", help="the picture")
    parser.add_argument("--title", help="title of the picture; default: what the runs have in common")
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(folder) for folder in options.runs]
        print(table(runs))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(runs, options.output, title=options.title)
    except (TrainerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"curves: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
