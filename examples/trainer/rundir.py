"""The run directory: whose it is, that one process alone writes to it, what a run finds out before its first step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.config import HARMLESS, Config, method_label, option_differences
from trainer.datasets import DataSet, load_images
from trainer.errors import OptionError, OtherProcessError, ResumeError
from trainer.files import read_json, readable, write_json
from trainer.folder import LEFT_OUT, NO_LABEL, FileRecord
from trainer.processes import Processes
from trainer.runlog import append_line, environment, software
from trainer.split import Split, files_before

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
    with readable(path):
        stored = read_json(path)
        options, place = stored["options"], stored["environment"]
        if not isinstance(options, dict) or not isinstance(place, dict):
            raise ValueError("its options or its environment are no object")
        if stored["format"] != FORMAT:
            raise ValueError(f"its format is {stored['format']!r}, this trainer reads {FORMAT}")
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


def create_run(config: Config, device: torch.device) -> None:
    """Write the `config.json` of a new run."""
    folder = Path(str(config.output))
    record = {"format": FORMAT, "label": method_label(config), "options": dataclasses.asdict(config)}
    record |= {"environment": environment(device), "software": software()}
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
    deciding = ({k: v for k, v in one.items() if k not in HARMLESS} for one in (stored, dataclasses.asdict(config)))
    different = list(option_differences(*deciding))
    if different:
        raise ResumeError(
            f"{config.output} holds a run with other options ({'; '.join(different)}): "
            "give the same options to continue it, or another --output to start a new run."
        )


def is_finished(folder: Path, config: Config, processes: Processes) -> bool:
    """Whether the run directory holds this run, finished; refuses one that holds another."""
    if not check_run(config, processes.device) or not (folder / "summary.json").exists():
        return False
    with readable(folder / "summary.json", "remove it, and the same command writes it again"):
        last = read_json(folder / "summary.json")["last"]
        accuracy = "" if last is None else f": last accuracy {float(last):.4f}"
    print(
        f"{folder} is finished{accuracy}. Give another --output for a new run; to train longer, start one with "
        f"--init-from {folder} and as many --steps as you want to add."
    )
    return True


def load(folder: Path, config: Config, processes: Processes) -> DataSet:
    """The data set. Process 0 alone checks the files and reads the run directory, and tells the others the result."""
    loaded: DataSet | None = None

    def first() -> dict[str, Any]:
        nonlocal loaded
        before = files_before(folder)
        loaded = load_images(config, before)
        if loaded.files is None or processes.world == 1:
            return {}
        files = loaded.files
        known = {"train": files.train, "manifest": files.manifest} if before and files.reasons else {}
        return {"left_out": files.left_out, "reasons": files.reasons, **known}

    told = processes.on_first(first)

    def others() -> DataSet:
        manifest = {name: (int(label), str(mark)) for name, (label, mark) in told.get("manifest", {}).items()}
        before = FileRecord(told.get("train", []), manifest, told.get("left_out", {}), reasons=told.get("reasons", {}))
        return load_images(dataclasses.replace(config, check_images=False, skip_damaged=True), before)

    return processes.together(lambda: loaded if loaded is not None else others())


def check_same_files(processes: Processes, split: Split) -> None:
    """Machines may have their own copies, which must be the same."""
    mine = torch.frombuffer(bytearray(bytes.fromhex(split.digest + split.data_digest)), dtype=torch.uint8)
    rows = processes.gather(mine)
    different = [rank for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
    if different:
        error = ResumeError(
            f"process {different[0]} lists other files in --data-dir, or other labeled images, than process 0: "
            "give every machine the same copy."
        )
        raise error if processes.first else OtherProcessError("process 0 has told why")


def _leaks(files: FileRecord, split: Split) -> Iterator[str]:
    """Sentences on test and held-out images that are trained on as well, and on images of several classes."""
    held = {files.train[k] for k in split.held_out.tolist()}
    trained = set(files.train) - held
    found: dict[str, list[str]] = {}
    for group in files.twins:
        inside = [name for name in group if name in trained]
        labels = {files.manifest[name][0]: name for name in group if name in trained or name in held}
        labels.pop(NO_LABEL, None)
        if len(labels) > 1:
            found.setdefault("images are in several classes", []).append(" is ".join(labels.values()))
        for name in set(group) - trained if inside else ():
            kind = "held-out" if name in held else "test"
            found.setdefault(f"{kind} images are trained on, too, with or without a label", []).append(
                f"{name} is {inside[0]}"
            )
    for what, pairs in found.items():
        yield f"{len(pairs)} {what} ({min(pairs)}{', ...' if len(pairs) > 1 else ''}): remove all but one of each."


def record_left_out(folder: Path, data: DataSet, split: Split) -> None:
    """Say and record which files are left out, and say which should not be twice in the data set."""
    if data.files is None:
        return
    for note in [*data.files.notes, *_leaks(data.files, split)]:
        print(f"note: {note}", file=sys.stderr)
    for what, names in (("damaged before the first step", data.files.left_out), ("went bad", data.files.reasons)):
        if names:
            print(f"note: {len(names)} files are left out ({what}), see {folder / LEFT_OUT}", file=sys.stderr)
    path = folder / LEFT_OUT
    known = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for name, reason in {**data.files.left_out, **data.files.reasons}.items():
        line = {"file": name, "reason": reason}
        if f'"file": {json.dumps(name)}' not in known:
            append_line(path, line)
