"""Files that are either the old ones or the new ones, whatever happens in between."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from trainer.errors import ResumeError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that `path` never holds half of it: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable, where the system can (Windows cannot open folders)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    regular_size(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; one that is being written, or that a kill cut off, has no end and does not count.

    Raises `ValueError` where a line is no JSON, or holds NaN or an infinity, which JSON does not have.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


@contextlib.contextmanager
def readable(path: Path, remedy: str = "restore it, or give another --output") -> Iterator[None]:
    """Refuse a file of a run that cannot be read, or that holds something else than is looked for."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(f"{path} cannot be read ({error}): {remedy}.") from error


def finite(value: Any, above: float = -math.inf) -> float:
    """A number as a float; raises `ValueError` or `TypeError` where it is none, not finite, or not above a limit."""
    if not (math.isfinite(float(value)) and value > above):
        raise ValueError(f"{value} is not a number to be found there")
    return float(value)


def regular_size(path: Path) -> int:
    """Size of a file in bytes."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    return found.st_size
