"""`--config FILE`: options from a JSON or YAML file, or from the `config.json` of a run, which repeats it."""

from __future__ import annotations

import collections
import difflib
import json
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from trainer.errors import OptionError

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
