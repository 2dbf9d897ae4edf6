"""Whole programs on CUDA: the trainers, killed and resumed, and two processes; each must equal the CPU."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from support import methods

from .conftest import SIMULATED
from .devices import computing_on
from .rank_program import SIZES, STEPS, term

ROOT = Path(__file__).parents[3]
#: Twenty steps with pinned memory and a worker, the term in three of them, a checkpoint after every fifth.
SHORT = [
    "--steps=20", "--batch-size=4", "--unlabeled-ratio=2", "--threshold=0.12", "--unlabeled-ramp=6",
    "--ggcr-warmup=8", "--ggcr-every=4", "--ggcr-max-pairs=2", "--eval-every=10", "--checkpoint-every=5",
    "--log-every=5", "--workers=1", "--progress=none",
]  # fmt: skip


def start(program: Sequence[str], device: str) -> subprocess.Popen[str]:
    """A program in a process of its own, in the simulated device's mode if that is the device."""
    mode = ["-m", "support.simulated_gpu"] if SIMULATED and device == "cuda" else []
    command = [sys.executable, "-W", "error", *mode, *program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def finish(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said[-4000:]


Program = Callable[[Path], list[str]]


def cifar(folder: Path) -> list[str]:
    pytest.importorskip("sklearn")
    return ["examples/fixmatch_cifar.py", "--preset=demo", "--labels=20", *SHORT]


def imagenet(folder: Path) -> list[str]:
    numpy, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    source = numpy.random.Generator(numpy.random.Philox(3))
    for part, count in (("train", 12), ("val", 4)):
        for label in ("ant", "bee"):
            (folder / "photos" / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = source.integers(256, size=(20, 24, 3), dtype=numpy.uint8)
                image.fromarray(pixels).save(folder / "photos" / part / label / f"{number}.JPEG")
    options = ["--label-fraction=0.5", "--image-size=16", "--arch=resnet18", "--lr=0.01", "--lr-warmup=1"]
    return ["examples/fixmatch_imagenet.py", f"--data-dir={folder / 'photos'}", *options, *SHORT]


@pytest.mark.parametrize("trainer", [cifar, imagenet])
def test_a_trainer_killed_and_resumed(trainer: Program, tmp_path: Path) -> None:
    program = trainer(tmp_path)
    expected = start([*program, "--device=cpu", f"--output={tmp_path / 'cpu'}"], "cpu")
    command = [*program, "--device=cuda", f"--output={tmp_path / 'cuda'}"]
    first = start(command, "cuda")
    begun = time.monotonic()
    while not (tmp_path / "cuda" / "checkpoints" / "step-00000010.json").exists():
        assert first.poll() is None, first.communicate()[0][-4000:]
        assert time.monotonic() < begun + 200
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    finish(start(command, "cuda"))
    finish(expected)
    found, judge = ((tmp_path / device / "metrics.jsonl").read_text().splitlines() for device in ("cuda", "cpu"))
    assert len(judge) >= 6
    if SIMULATED:
        assert found == judge
    else:
        assert len(found) == len(judge)


def test_two_processes(tmp_path: Path) -> None:
    """DDP over gloo with CUDA tensors, in a group for both devices and in one for CUDA alone."""
    ranks = []
    for rank in range(2):
        command = [sys.executable, "-m", "gpu.cases.rank_program", str(rank), str(tmp_path)]
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT))
    for process in ranks:
        finish(process)
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
