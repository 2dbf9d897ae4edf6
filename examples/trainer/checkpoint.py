"""Checkpoints that are whole or absent, verified before they are read, and that can run no code.

`step-N.pt` is written first, then `step-N.json` with its size and SHA-256: a checkpoint without its JSON does not
exist. The last two are kept, so that damage on the disk costs one interval and not the run.
"""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from trainer.errors import CheckpointError
from trainer.files import read_json, regular_size, write_atomically, write_json

FORMAT = 1
KEEP = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint, then forget all but the last two."""
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
        forget_older(folder, step, later=True)  # which were damaged, and skipped on resuming
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error}). Earlier checkpoints are untouched: "
            "free some space and start the same command again."
        ) from error
    return path


def forget_older(folder: Path, step: int, *, later: bool = False) -> None:
    """Keep the last two checkpoints up to a step; a kill after writing one may have left more."""
    found = sorted(folder.glob("step-*.pt"))
    upto = [path for path in found if path.name <= f"step-{step:08d}.pt"]
    for old in upto[:-KEEP] + (found[len(upto) :] if later else []):
        old.with_suffix(".json").unlink(missing_ok=True)
        old.unlink()


def load_latest(folder: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole; say on stderr which newer ones are damaged."""
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
        return read_checkpoint(path, content)
    if problems:
        raise CheckpointError(
            f"no checkpoint of this run is whole ({'; '.join(problems)}): "
            f"restore one from a backup, or delete {folder} to start the run from its beginning."
        )
    return None


def _verified(path: Path, record: Path) -> bytes:
    stated, size = read_json(record), regular_size(path)
    if size != stated["bytes"]:
        raise ValueError(f"it has {size} bytes, its record says {stated['bytes']}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != stated["sha256"]:
        raise ValueError("its SHA-256 is not the one in its record")
    if stated["format"] != FORMAT:  # whole, so not to be passed over for an older one
        raise CheckpointError(
            f"{path} has format {stated['format']}, this trainer reads {FORMAT}: continue with the version that wrote "
            f"it, or remove it and {record.name} to continue from the checkpoint before."
        )
    return content


def read_checkpoint(path: Path, content: bytes) -> dict[str, Any]:
    """The state in the bytes of a checkpoint; `path` is where they are from, and nothing but values is let through."""
    try:
        _check_archive(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        _check_sizes(state, len(content))
    except Exception as error:  # a forged file can fail anywhere in torch's reader, and with any class
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} is refused: it holds something other than tensors and plain values, or is no checkpoint "
            f"({reason}). Nothing in it was executed; remove the file if you do not know it."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the state of a run: remove the file.")
    return state


def _check_archive(content: bytes) -> None:
    """Leave to torch only what `torch.save` writes: an archive that is no larger unpacked than packed.

    Its older readers (tar, bare pickle) and compressed members, a few kilobytes that unpack to all of the memory, are
    not needed.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{error}: if a torch before 1.6 wrote it, load it and save it again") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it has compressed members, which torch.save does not write")
    if sum(member.file_size for member in members) > len(content):
        raise ValueError("its members are larger than the file")


def _check_sizes(value: Any, most: int) -> None:
    """Refuse a tensor larger than its file: of strides 0, it is a few bytes there and all of the memory once copied."""
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() > most:
            raise ValueError(f"a tensor of shape {tuple(value.shape)} is larger than the file")
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_sizes(inner, most)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and the unrecorded checkpoint that a kill left behind."""
    unrecorded = [path for path in sorted(folder.glob("step-*.pt")) if not path.with_suffix(".json").exists()]
    if len(unrecorded) > 1:
        raise CheckpointError(
            f"{folder} holds checkpoints without their records ({', '.join(path.name for path in unrecorded)}): "
            "restore the .json files beside them, or remove the checkpoints to continue without them."
        )
    for path in [*folder.glob("*.tmp"), *unrecorded]:
        path.unlink()
