"""What a run finds out before its first step: its data, whether it is finished, and what its weights are about."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.config import Config
from trainer.datasets import DataSet, load_images
from trainer.errors import OtherProcessError, ResumeError
from trainer.folder import LEFT_OUT, NO_LABEL, FileRecord
from trainer.processes import Processes
from trainer.rundir import check_run, finished_line
from trainer.runlog import append_line
from trainer.split import Split, files_before


def is_finished(folder: Path, config: Config, processes: Processes) -> bool:
    """Whether the run directory holds this run, finished; refuses one that holds another."""
    if not check_run(config, processes.device) or not (folder / "summary.json").exists():
        return False
    print(
        f"{finished_line(folder)}. Give another --output for a new run; to train longer, start one with --init-from "
        f"{folder} and as many --steps as you want to add."
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
