"""Changes to the arguments of a good call, for tables of bad ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def put(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Replace arguments; a function is applied to the good argument."""

    def change(arguments: dict[str, Any]) -> None:
        for key, value in changes.items():
            arguments[key] = value(arguments[key]) if callable(value) else value

    return change


def poke(name: str, index: Any, value: float) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments[name] = arguments[name].clone()
        arguments[name][index] = value

    return change
