"""Whole programs on CUDA: the trainers, stopped and resumed, and two processes; each must equal the CPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from support import methods
from support.processes import run_program, started

from . import rank_program
from .conftest import SIMULATED
from .devices import computing_on
from .rank_program import SIZES, STEPS, term

#: Eight steps with pinned memory and a worker, the term in two of them, a stop and a checkpoint after five.
SHORT = [
    "--steps=8", "--batch-size=4", "--unlabeled-ratio=2", "--threshold=0.12", "--unlabeled-ramp=6",
    "--ggcr-warmup=3", "--ggcr-every=3", "--ggcr-max-pairs=2", "--eval-every=4", "--checkpoint-every=5",
    "--log-every=2", "--workers=1", "--progress=none", "--arch=wrn-10-1",
]  # fmt: skip


@pytest.mark.parametrize("trainer", ["CIFAR", "IMAGENET"])
def test_a_trainer_stopped_and_resumed(trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("torchvision")
    config, cli, training = (importlib.import_module(f"trainer.{name}") for name in ("config", "cli", "training"))
    monkeypatch.setattr(training, "draw_curves", lambda runs, path, **_: path.touch())
    options = ["--preset=demo", "--labels=20"]
    if trainer == "IMAGENET":
        parts = {"train": {"ant": 12, "bee": 12}, "val": {"ant": 4, "bee": 4}}
        photos = importlib.import_module("support.pictures").draw_folder(tmp_path / "photos", parts, size=(24, 20))
        options = [f"--data-dir={photos}", "--label-fraction=0.5", "--image-size=16", "--lr=0.01", "--lr-warmup=1"]

    def run(device: str, *more: str) -> None:
        given = [*options, *SHORT, f"--device={device}", f"--output={tmp_path / device}", *more]
        torch.manual_seed(len(more))  # what the process drew before does not matter
        assert training.run(cli.parse_config(given, getattr(config, trainer))) == 0

    with computing_on("cpu"):
        run("cpu")
    run("cuda", "--stop-after-steps=5")
    run("cuda")
    found, judge = ((tmp_path / device / "metrics.jsonl").read_text().splitlines() for device in ("cuda", "cpu"))
    assert len(judge) >= 6
    if SIMULATED:
        assert found == judge
    else:
        assert len(found) == len(judge)


def test_two_processes(tmp_path: Path) -> None:
    """DDP over gloo with CUDA tensors, in a group for both devices and in one for CUDA alone."""
    ranks = [started(run_program, rank_program.__file__, [str(rank), str(tmp_path)]) for rank in range(2)]
    for process in ranks:
        process.join(200)
        assert process.exitcode == 0
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    with computing_on("cpu"):
        gradients = {n: methods.distributed_run(n, None, SIZES, STEPS)["gradients"] for n in methods.SHARED}
        alone = term(None, "cpu")
    for result in results:
        for name, expected in gradients.items():
            found = [each.cpu() for each in result["runs"][name]]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        for which in ("term", "term of a CUDA group"):
            torch.testing.assert_close(result[which], alone, rtol=1e-9, atol=1e-11)
        assert "No backend type associated with device type cpu" in result["refused"]
