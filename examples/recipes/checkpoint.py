"""Checkpoints that are whole or absent, verified before they are read, and that can run no code.

`step-N.pt` is written first, then `step-N.json` with its size and SHA-256: a checkpoint without its JSON does not
exist. The last two are kept, so that damage on the disk costs one interval and not the run.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from recipes.errors import CheckpointError
from recipes.files import read_json, write_atomically, write_json

FORMAT = 1
KEEP = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint, then forget all but the last two.

    Args:
        folder: The run's `checkpoints/`.
        step: Steps done.
        state: Tensors, numbers, strings, lists and dicts.

    Returns:
        The path of the `.pt` file.

    Raises:
        CheckpointError: Where the disk refuses; earlier checkpoints are untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{step:08d}.pt"
    record = {"format": FORMAT, "step": step, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A stop at the step of an existing checkpoint rewrites it: its old record must not vouch for new bytes.
        path.with_suffix(".json").unlink(missing_ok=True)
        write_atomically(path, lambda file: file.write(content))
        write_json(path.with_suffix(".json"), record)
        for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error}). Earlier checkpoints are untouched: "
            "free some space and start the same command again."
        ) from error
    return path


def load_latest(folder: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole; say on stderr which newer ones are damaged.

    Args:
        folder: The run's `checkpoints/`; may be absent.

    Returns:
        The state on the CPU, or None where there is no checkpoint.

    Raises:
        CheckpointError: Where all checkpoints are damaged, or one holds more than tensors and plain values.
    """
    records = sorted(folder.glob("step-*.json"), reverse=True)
    problems = []
    for record in records:
        path = record.with_suffix(".pt")
        try:
            content = _verified(path, record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}: {error}")
            print(f"warning: skipping a damaged checkpoint: {problems[-1]}", file=sys.stderr)
            continue
        return _load(path, content)
    if problems:
        raise CheckpointError(
            "no checkpoint of this run is whole:\n  " + "\n  ".join(problems) + "\n"
            f"Restore one from a backup, or delete {folder} to start the run from its beginning."
        )
    return None


def read_checkpoint(path: Path, content: bytes) -> dict[str, Any]:
    """Read the bytes of a checkpoint of any run.

    Args:
        path: Where they are from, for messages.
        content: The bytes.

    Returns:
        The state on the CPU.

    Raises:
        CheckpointError: Where they hold more than tensors and plain values, or no state.
    """
    return _load(path, content)


def _verified(path: Path, record: Path) -> bytes:
    stated = read_json(record)
    if stated["format"] != FORMAT:
        raise ValueError(f"its format is {stated['format']}, this trainer reads {FORMAT}")
    content = path.read_bytes()
    if len(content) != stated["bytes"]:
        raise ValueError(f"it has {len(content)} bytes, its record says {stated['bytes']}")
    if hashlib.sha256(content).hexdigest() != stated["sha256"]:
        raise ValueError("its SHA-256 is not the one in its record")
    return content


def _load(path: Path, content: bytes) -> dict[str, Any]:
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} is refused: it holds something other than tensors and plain values, or is no checkpoint "
            f"({str(error).splitlines()[0]}). Nothing in it was executed; remove the file if you do not know it."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the state of a run: remove the file.")
    return state


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and unrecorded checkpoints that a kill left behind."""
    for path in folder.glob("*.tmp"):
        path.unlink()
    for path in folder.glob("step-*.pt"):
        if not path.with_suffix(".json").exists():
            path.unlink()
