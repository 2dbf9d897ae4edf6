"""`examples/distributed.py` under torchrun: the number of processes changes neither the run nor a resumed one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import distributed
from support.processes import run_program, under_torchrun


def test_two_processes_train_as_one_and_resume_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(world: int, steps: int, name: str) -> torch.Tensor:
        """All parameters after these steps."""
        arguments = ["--steps", str(steps), "--checkpoint", str(tmp_path / name)]
        if world > 1:
            assert under_torchrun(world, 0, run_program, distributed.__file__, arguments) == 0
        else:
            monkeypatch.setattr(sys, "argv", ["distributed.py", *arguments])
            assert distributed.main() == 0
        state = torch.load(tmp_path / name, weights_only=True)["wrapper"]
        assert state["_extra_state"]["step"] == steps
        return torch.cat([value.flatten() for value in state.values() if isinstance(value, torch.Tensor)])

    alone = run(1, 60, "one.pt")
    assert float((run(2, 30, "two.pt") - alone).norm()) > 0.01  # half the steps are another run
    # float32, 30 steps on two processes and 30 on one
    assert float((run(1, 60, "two.pt") - alone).norm()) < 1e-3
    assert capsys.readouterr().out.count("1 processes, 60 steps: sum of |parameters| = ") == 2
