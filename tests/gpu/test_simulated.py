"""Runs the files of tests/gpu/cases on a GPU in software, each in a process that preloads it.

On a machine with a GPU the same files run on it: `python -m pytest tests/gpu/cases/*.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import simulated_gpu

CASES = Path(__file__).with_name("cases")
#: Files, and words in the names of their tests: what takes longer comes in parts, which run side by side.
PARTS = [
    ("programs.py", "imagenet"),
    ("programs.py", "cifar"),
    ("programs.py", "two"),
    ("zoo.py", "loop"),
    ("zoo.py", "not loop"),
    ("training.py", ""),
    ("budgets.py", ""),
    ("single_precision.py", ""),
]


def test_every_file_runs() -> None:
    assert {file for file, _ in PARTS} == {
        path.name for path in CASES.glob("*.py") if "\ndef test_" in path.read_text()
    }


@pytest.mark.parametrize(("file", "only"), PARTS)
def test_on_the_simulated_gpu(file: str, only: str) -> None:
    reason = simulated_gpu.missing()
    if reason:
        pytest.skip(reason)
    options = ["-q", "-k", only, "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, str(CASES / file)]
    environment = {**os.environ, **simulated_gpu.environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=290)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
