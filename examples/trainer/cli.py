"""From the command line and `--config FILE` to a `Config`: preset and file first, so that `--help` shows what holds.

Nothing here imports torch, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import tyro

from trainer.config import CIFAR, Config
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

_KINDS = typing.get_type_hints(Config)  # of each option


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


def _switches(arguments: Sequence[str]) -> list[str]:
    """Let every option that is true or false be written as `--flip`, `--no-flip` and `--flip False` alike."""
    rest, words = list(arguments), list[str]()
    while rest:
        word = rest.pop(0)
        option = word.removeprefix("--no-").removeprefix("--").replace("_", "-")
        kind = _KINDS.get(option.replace("-", "_"))
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
    kind = _KINDS.get(option[1][2:].replace("-", "_")) if option else None
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
    switches = {f"no_{name}" for name, kind in _KINDS.items() if kind in (bool, bool | None)}
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


# Where a run was, not what it was: a repetition is another run.
NOT_REPEATED = frozenset({"output", "config"})


def read_options(path: Path, kind: type[Any]) -> dict[str, Any]:
    """Read options from a JSON or YAML object such as `{"labels": 250, "seed": 1}`, or from a run's `config.json`.

    `kind` is the record of the trainer's options, whose fields and types are the ones allowed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = _yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text, object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(
            f"--config {path} cannot be read ({error}): give options in JSON or (.yaml) YAML, or a run's config.json."
        ) from error
    record = isinstance(found, dict) and isinstance(found.get("options"), dict)
    options = found["options"] if record else found
    if not isinstance(options, dict):
        raise OptionError(
            f'--config {path} holds a {type(found).__name__}: write an object of options, such as {{"labels": 250}}.'
        )
    types_by_name = typing.get_type_hints(kind)
    for name, value in options.items():
        if name not in types_by_name:
            close = difflib.get_close_matches(name.replace("-", "_"), types_by_name, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "the trainer's --help lists what there is."
            raise OptionError(f"--config {path}: {name!r} is no option; {hint}")
        if not _fits(value, types_by_name[name]):
            found_text, expected = json.dumps(value, default=str), described(types_by_name[name])
            raise OptionError(f"--config {path}: {name!r} is {found_text}; expected {expected}.")
    if record:
        return {name: value for name, value in options.items() if name not in NOT_REPEATED}
    if "config" in options:
        raise OptionError(f"--config {path}: 'config' in a file would be another file; put the options into one.")
    return options


def _yaml(text: str) -> Any:
    """What a YAML file holds, by PyYAML's safe loader; a name that stands there twice is refused, as in JSON."""
    try:
        import yaml
    except ImportError as error:
        raise ValueError("YAML needs PyYAML: pip install pyyaml") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        return _unique(loader.construct_pairs(node, deep=True))

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    # 1e-3 is a text in YAML 1.1, which PyYAML reads, and a number to everybody else.
    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names all differ; JSON itself would take the last of two."""
    if foreign := [name for name, _ in pairs if not isinstance(name, str)]:
        raise ValueError(f"{foreign[0]!r} is no name of an option")
    for name, count in collections.Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{name!r} is there twice: leave one of them")
    return dict(pairs)


def _choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    for choice in _choices(kind):
        if typing.get_origin(choice) is Literal:
            if value in typing.get_args(choice):
                return True
        elif choice is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return True
        elif type(value) is choice:  # True is no integer here
            return True
    return False


def described(kind: Any) -> str:
    """A type for people: `an integer or "all" or null`."""
    names = []
    for choice in _choices(kind):
        if typing.get_origin(choice) is Literal:
            names += [json.dumps(value) for value in typing.get_args(choice)]
        else:
            names.append({str: "text", int: "an integer", float: "a number", bool: "true or false"}.get(choice, "null"))
    return " or ".join(names)
