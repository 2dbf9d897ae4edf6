"""From the command line to a `Config`: the preset first, so that `--help` shows the defaults that hold."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import tyro

from recipes.config import PRESETS, Config, preset_config


def parse_config(arguments: Sequence[str], *, program: str, description: str) -> Config:
    """Parse a trainer's command line; an unknown option or a wrong value ends the process with status 2.

    Args:
        arguments: The command line without the program's name.
        program: The program's name, for the usage line.
        description: What `--help` says first.

    Returns:
        The preset's defaults, overridden by the options given.
    """
    # The preset decides the defaults of all other options, so it is read before them; a wrong name is left to
    # the full parser, whose message lists the choices.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default=Config.preset)
    preset = early.parse_known_args(list(arguments))[0].preset
    return tyro.cli(
        Config,
        args=list(arguments),
        default=preset_config(preset if preset in PRESETS else Config.preset),
        prog=program,
        description=description,
    )
