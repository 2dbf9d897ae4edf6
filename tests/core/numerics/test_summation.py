"""N9 of the test plan, in its quick form: the program for long sums runs and passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_n09_long_sums_keep_their_digits() -> None:
    command = [sys.executable, str(ROOT / "tests" / "slow" / "summation.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "P = 1e5" in done.stdout
