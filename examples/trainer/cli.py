"""From the command line to a `Config`: preset and file first, so that `--help` shows the defaults that hold."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from trainer.config import PRESETS, Config, preset_config
from trainer.config_file import read_options
from trainer.errors import OptionError

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
        The preset's defaults, overridden by those of the file `--config`, overridden by the options given.
    """
    # Preset and file decide the defaults of all other options, so they are read before them; a wrong preset is left
    # to the full parser, whose message lists the choices.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--config")
    given = early.parse_known_args(list(arguments))[0]
    try:
        default = _defaults(presets, given.preset, given.config)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    return tyro.cli(
        type(default),
        args=list(arguments),
        default=default,
        prog=program,
        description=description,
    )


def _defaults(presets: Mapping[str, Options], preset: str | None, file: str | None) -> Options:
    first = next(iter(presets.values()))
    if file in (None, "None"):  # as the full parser reads it
        return presets.get(str(preset), first)
    options = read_options(Path(file), type(first))
    named = options.get("preset", preset)
    if preset not in (None, named):
        raise OptionError(f"--preset {preset}, but --config {file} has the preset {named}: leave one of them out.")
    return dataclasses.replace(presets.get(str(named), first), **options)
