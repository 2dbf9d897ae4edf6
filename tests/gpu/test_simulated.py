"""Runs the files of tests/gpu/cases on a GPU in software, in processes that preload it.

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
#: What one process runs of the files there; starting one costs seconds.
PARTS = {
    "models": ["zoo.py", "single_precision.py"],
    "training": ["programs.py", "training.py", "budgets.py"],
}


def test_every_file_runs() -> None:
    assert set().union(*PARTS.values()) == {p.name for p in CASES.glob("*.py") if "\ndef test_" in p.read_text()}


@pytest.mark.timeout(900)  # on a busy machine
@pytest.mark.parametrize("part", PARTS)
def test_on_the_simulated_gpu(part: str) -> None:
    reason = simulated_gpu.missing()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(CASES / file) for file in PARTS[part]]
    environment = {**os.environ, **simulated_gpu.environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=880)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
