"""Starts a program of this folder, and says what is missing; imports nothing itself, so that it can."""

from __future__ import annotations

import importlib
import sys


def start(program: str, description: str, presets: str) -> int:
    """Parse the command line and train.

    Args:
        program: The program's name.
        description: What `--help` says first.
        presets: Name of its presets in `trainer.config`.

    Returns:
        The exit status.
    """
    try:
        known = getattr(importlib.import_module("trainer.config"), presets)
        parse = importlib.import_module("trainer.cli").parse_config
        config = parse(sys.argv[1:], known, program=program, description=description)
        main = importlib.import_module("trainer.training").main  # only now: it imports torch, which --help does without
    except ModuleNotFoundError as error:
        return missing(error)
    return int(main(config))


def missing(error: ModuleNotFoundError) -> int:
    """Name the package that is not installed, and the line that installs it; returns the exit status."""
    print(
        f"error: {error.name} is not installed, which the programs of this folder need: "
        "pip install '.[examples]' in the project's folder.",
        file=sys.stderr,
    )
    return 2
