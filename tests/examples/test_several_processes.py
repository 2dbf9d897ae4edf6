"""`examples/distributed.py` under torchrun: the number of processes changes neither the run nor a resumed one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

PROGRAM = Path(__file__).parents[2] / "examples" / "distributed.py"


def run(world: int, steps: int, checkpoint: Path) -> float:
    """What the program prints of its parameters."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    command = [sys.executable, *launcher, str(PROGRAM), "--steps", str(steps), "--checkpoint", str(checkpoint)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    found = re.search(rf"{world} processes, {steps} steps: sum of \|parameters\| = ([\d.]+)", done.stdout)
    assert found, done.stdout
    return float(found[1])


def test_two_processes_train_as_one_and_resume_as_one(tmp_path: Path) -> None:
    alone = run(1, 60, tmp_path / "one.pt")
    assert abs(run(2, 30, tmp_path / "two.pt") - alone) > 0.01  # half the steps are another run
    assert abs(run(1, 60, tmp_path / "two.pt") - alone) < 1e-3  # float32, 30 steps on two processes and 30 on one
    state = torch.load(tmp_path / "two.pt", weights_only=True)
    assert state["wrapper"]["_extra_state"]["step"] == 60
