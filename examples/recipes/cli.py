"""From the command line to a `Config`: the preset first, so that `--help` shows the defaults that hold."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TypeVar

import tyro

from recipes.config import PRESETS, Config, preset_config

Options = TypeVar("Options", bound=Config)

# By preset, the defaults of `fixmatch_cifar.py`.
CIFAR: Mapping[str, Config] = {name: preset_config(name) for name in PRESETS}


def parse_config(arguments: Sequence[str], *, program: str, description: str) -> Config:
    """`parse_options` for `fixmatch_cifar.py`."""
    return parse_options(arguments, CIFAR, program=program, description=description)


def parse_options(
    arguments: Sequence[str], presets: Mapping[str, Options], *, program: str, description: str
) -> Options:
    """Parse a trainer's command line; an unknown option or a wrong value ends the process with status 2.

    Args:
        arguments: The command line without the program's name.
        presets: Defaults by the name of the preset; the first of them holds where none is named.
        program: The program's name, for the usage line.
        description: What `--help` says first.

    Returns:
        The preset's defaults, overridden by the options given.
    """
    # The preset decides the defaults of all other options, so it is read before them; a wrong name is left to
    # the full parser, whose message lists the choices.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default=next(iter(presets)))
    preset = early.parse_known_args(list(arguments))[0].preset
    default = presets.get(preset, next(iter(presets.values())))
    return tyro.cli(
        type(default),
        args=list(arguments),
        default=default,
        prog=program,
        description=description,
    )
