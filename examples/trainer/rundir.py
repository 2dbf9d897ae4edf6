"""The run directory: whose it is, and that only one process writes to it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.config import HARMLESS, Config, method_label
from trainer.errors import OptionError, ResumeError
from trainer.files import read_json, write_json
from trainer.runlog import environment, software

FORMAT = 1


def check_run(config: Config, device: torch.device) -> bool:
    """Look into the run directory, without writing: is it new, or the same run?"""
    folder = Path(str(config.output))
    path = folder / "config.json"
    if not path.exists():
        if any(folder.glob("checkpoints/*.pt")) or (folder / "metrics.jsonl").exists():
            raise ResumeError(f"{folder} holds a run without its config.json: restore it, or give another --output.")
        return False
    if config.resume == "never":
        raise ResumeError(f"--resume never, but {folder} holds a run: give another --output, or --resume auto.")
    try:
        stored = read_json(path)
        options, place = stored["options"], stored["environment"]
        if not isinstance(options, dict) or not isinstance(place, dict):
            raise ValueError("its options or its environment are no object")
        if stored["format"] != FORMAT:
            raise ValueError(f"its format is {stored['format']!r}, this trainer reads {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{path} cannot be read ({error}): restore it, or give another --output.") from error
    before = options.get("processes")
    if before != config.processes and not config.elastic:
        raise ResumeError(
            f"{folder} holds a run of {before} processes, and there are {config.processes} now: BatchNorm's statistics "
            "and the pairs of --ggcr-max-pairs would be others. Start as many as before, or give --elastic to go on "
            "all the same, or another --output."
        )
    check_same_run(options, config)
    _compare_environment(place, environment(device))
    return True


def finished_line(folder: Path) -> str:
    """What to say of a finished run."""
    try:
        last = read_json(folder / "summary.json")["last"]
        return f"{folder} is finished" + ("" if last is None else f": last accuracy {float(last):.4f}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{folder / 'summary.json'} cannot be read ({error}): remove it, and the same command writes it anew."
        ) from error


def create_run(config: Config, device: torch.device) -> None:
    """Write the `config.json` of a new run."""
    folder = Path(str(config.output))
    record = {
        "format": FORMAT,
        "label": method_label(config),
        "options": dataclasses.asdict(config),
        "environment": environment(device),
        "software": software(),
    }
    try:
        write_json(folder / "config.json", record)
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> OptionError:
    return OptionError(f"--output {folder} cannot be used ({error}): give a folder that you can write to.")


def _compare_environment(before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        print(
            f"note: continuing elsewhere than the run began ({', '.join(changed)}): "
            "results stay valid, but not bitwise those of an uninterrupted run.",
            file=sys.stderr,
        )


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the run directory, created where it is absent, for this process; the lock ends with it, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 - closed below, after the run
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks; two trainers in one directory remain the user's mistake
        fcntl = None  # type: ignore[assignment]
    with file:
        try:
            # Not flock, which forked data workers inherit: they outlive a killed trainer by seconds, and it with them.
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            raise ResumeError(
                f"{folder} is in use by another process: wait for it, stop it, or give another --output."
            ) from error
        yield


def check_same_run(stored: dict[str, Any], config: Config) -> None:
    """Refuse to continue a run with options that would make it another run."""
    wanted = dataclasses.asdict(config)
    keys = sorted((stored.keys() | wanted.keys()) - HARMLESS)
    missing = "(absent)"
    different = [
        f"--{key.replace('_', '-')}: {stored.get(key, missing)} there, {wanted.get(key, missing)} now"
        for key in keys
        if stored.get(key, missing) != wanted.get(key, missing)
    ]
    if different:
        raise ResumeError(
            f"{config.output} holds a run with other options ({'; '.join(different)}): "
            "give the same options to continue it, or another --output to start a new run."
        )
