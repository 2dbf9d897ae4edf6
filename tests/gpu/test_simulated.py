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
FILES = sorted(path.name for path in CASES.glob("*.py") if "\ndef test_" in path.read_text())
#: The longest file in two halves, so that two cores have as much to do.
PARTS = [(file, "loop") for file in FILES if file == "zoo.py"] + [
    (file, "not loop" if file == "zoo.py" else "") for file in FILES
]


@pytest.mark.parametrize(("file", "only"), PARTS)
def test_on_the_simulated_gpu(file: str, only: str) -> None:
    reason = simulated_gpu.missing()
    if reason:
        pytest.skip(reason)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        only,
        str(CASES / file),
    ]
    environment = {**os.environ, **simulated_gpu.environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=290)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
