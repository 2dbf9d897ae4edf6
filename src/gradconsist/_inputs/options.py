"""Checks of option values, which they return. Each error names the option, says what was found and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar

from gradconsist.errors import ConfigError

Value = TypeVar("Value")


def check_choice(name: str, value: Value, choices: Iterable[object]) -> Value:
    """Returns `value` if it is one of `choices`; else the message names the closest one."""
    options = list(choices)
    if any(value is option or (isinstance(value, str) and value == option) for option in options):
        return value
    near = get_close_matches(str(value), [str(option) for option in options], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"`{name}` is {value!r}: choose one of {', '.join(repr(option) for option in options)}.{hint}")


def check_count(name: str, value: int, least: int = 1, most: float = math.inf) -> int:
    """Returns `value` if it is an int (not a bool) in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        upper = f" and at most {most}" if math.isfinite(most) else ""
        raise ConfigError(f"`{name}` is {value!r}: give an int of at least {least}{upper}.")
    return value


def check_number(name: str, value: float, least: float, most: float = math.inf) -> float:
    """Returns `value` if it is a finite real number in [least, most]."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not least <= value <= most:
        upper = f" and at most {most:g}" if math.isfinite(most) else ""
        raise ConfigError(f"`{name}` is {value!r}: give a finite number of at least {least:g}{upper}.")
    return value
