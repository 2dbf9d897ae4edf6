"""From the command line to a `Config`: preset and file first, so that `--help` shows the defaults that hold.

Nothing here imports torch, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from trainer.config import CIFAR, Config
from trainer.config_file import described, read_options
from trainer.errors import OptionError, refuse

# Words of other trainers, and what they are here.
_EXPLAINED = {
    "epochs": "this trainer counts steps: --steps = epochs x images / (--batch-size x --unlabeled-ratio)",
    "learning_rate": "write --lr",
    "model": "write --arch",
    "gpus": "start the trainer with torchrun --nproc-per-node",
    "pretrained": "write --init-from pretrained",
    "num_labels": "write --labels",
    "num_classes": "the classes are those of the data set",
    "num_workers": "write --workers",
}


def parse_config(
    arguments: Sequence[str],
    presets: Mapping[str, Config] = CIFAR,
    *,
    program: str = "fixmatch_cifar.py",
    description: str = "",
) -> Config:
    """Parse the trainer's command line; an unknown option or a wrong value ends the process with status 2.

    The first of the presets holds where none is named; `description` is what `--help` says first.
    """
    try:
        return _parse(arguments, presets, program, description)
    except OptionError as error:
        raise SystemExit(refuse(error)) from error


def _parse(arguments: Sequence[str], presets: Mapping[str, Config], program: str, description: str) -> Config:
    # Preset and file decide the defaults of all other options, so they are read before them.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", nargs="?")
    early.add_argument("--config", nargs="?")
    given = early.parse_known_args(list(arguments))[0]
    if given.preset is not None and given.preset not in presets:
        raise OptionError(f"--preset {given.preset!r} is unknown: choose from {', '.join(presets)}.")
    default = _defaults(presets, given.preset, given.config)
    for word in arguments:
        _check_name(word)
    said, words = io.StringIO(), _switches(arguments)
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(Config, args=words, default=default, prog=program, description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # A box of several lines: its frame goes, its words stay.
        text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]|-{4,}|Parsing error|For full helptext.*", " ", said.getvalue())
        raise OptionError(f"{_wrong_value(words, text) or ' '.join(text.split())} (--help lists the options)") from stop
    return config


@functools.cache
def _kinds() -> dict[str, Any]:
    """The type of each option."""
    return typing.get_type_hints(Config)


def _switches(arguments: Sequence[str]) -> list[str]:
    """Let every option that is true or false be written as `--flip`, `--no-flip` and `--flip False` alike."""
    rest, words = list(arguments), list[str]()
    while rest:
        word = rest.pop(0)
        option = word.removeprefix("--no-").removeprefix("--").replace("_", "-")
        kind = _kinds().get(option.replace("-", "_"))
        if kind not in (bool, bool | None) or not word.startswith("--"):
            words.append(word)
            continue
        value = str(not word.startswith("--no-"))
        if value == "True" and rest and rest[0] in ("True", "False", *(["None"] if kind is not bool else [])):
            value = rest.pop(0)
        words += [f"--{option}", value] if kind is not bool else [f"--{'' if value == 'True' else 'no-'}{option}"]
    return words


def _wrong_value(words: list[str], text: str) -> str | None:
    """What to say of an option whose value is none; None where the parser's own words are to be kept."""
    option = re.search(r"(?:parsing|argument) '?(--[\w-]+)", text)
    kind = _kinds().get(option[1][2:].replace("-", "_")) if option else None
    if option is None or kind is None:
        return None
    given = [word.partition("=")[2] for word in words if word.startswith(f"{option[1]}=")]
    given += [word for before, word in itertools.pairwise(words) if before == option[1]]
    expected = described(kind).replace("null", "None")
    return f"{option[1]} is {', '.join(map(repr, given)) or 'empty'}; expected {expected}"


def _check_name(word: str) -> None:
    """Refuse an option that does not exist, with the nearest one that does."""
    if not word.startswith("--") or word == "--":
        return
    name = word[2:].split("=")[0].replace("-", "_")
    fields = {field.name for field in dataclasses.fields(Config)} - {"recipe", "processes"}
    switches = {f"no_{name}" for name, kind in _kinds().items() if kind in (bool, bool | None)}
    if name in fields | switches | {"help"}:
        return
    hint = _EXPLAINED.get(name)
    if hint is None:
        close = next(iter(difflib.get_close_matches(name, [*fields, *_EXPLAINED], n=1)), None)
        meant = f"did you mean --{str(close).replace('_', '-')}?" if close else "--help lists what there is."
        hint = _EXPLAINED.get(str(close), meant)
    raise OptionError(f"{word.split('=')[0]} is no option; {hint}")


def _defaults(presets: Mapping[str, Config], preset: str | None, file: str | None) -> Config:
    first = next(iter(presets.values()))
    if file in (None, "None"):  # as the full parser reads it
        return presets.get(str(preset), first)
    options = read_options(Path(str(file)), type(first))
    named = options.get("preset", preset)
    if preset not in (None, named):
        raise OptionError(f"--preset {preset}, but --config {file} has the preset {named}: leave one of them out.")
    return dataclasses.replace(presets.get(str(named), first), **options)
