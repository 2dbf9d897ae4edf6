"""What must hold before a run begins or goes on: its directory, and the same files on every machine."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from trainer.errors import ResumeError
from trainer.files import read_json
from trainer.imagenet.config import RUN_HARMLESS, ImageNetConfig
from trainer.processes import OtherProcessError, Processes
from trainer.rundir import check_run, last_accuracy
from trainer.split import Split


def is_finished(config: ImageNetConfig, processes: Processes) -> bool:
    """Whether the run directory holds this run, finished; refuses one that holds another."""
    folder = Path(str(config.output))
    if not config.elastic:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # `check_run` tells what is wrong there
            before = int(read_json(folder / "config.json")["options"]["processes"])
            if before != processes.world:
                raise ResumeError(
                    f"{folder} holds a run of {before} processes, and there are {processes.world} now: BatchNorm's "
                    "statistics and the pairs of --ggcr-max-pairs would be others. Start as many as before, or give "
                    "--elastic to go on all the same, or another --output."
                )
    known = check_run(config, processes.device, RUN_HARMLESS)
    if known and (folder / "summary.json").exists():
        print(f"{folder} is finished: top-1 accuracy {last_accuracy(folder):.4f}. Give another --output for a new run.")
        return True
    return False


def check_same_files(processes: Processes, split: Split) -> None:
    """Machines may have copies of their own, which must be the same."""
    mine = torch.frombuffer(bytearray(bytes.fromhex(split.digest + split.data_digest)), dtype=torch.uint8)
    rows = processes.gather(mine)
    different = [rank for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
    if different:
        error = ResumeError(
            f"process {different[0]} lists other files in --data-dir, or other labeled images, than process 0: "
            "give every machine the same copy."
        )
        raise error if processes.first else OtherProcessError("process 0 has told why")
