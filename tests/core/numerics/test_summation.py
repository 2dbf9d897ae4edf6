"""N9 of the test plan, in its quick form: the program for long sums runs and passes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_n09_long_sums_keep_their_digits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["summation.py", "--quick"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "tests" / "slow" / "summation.py"), run_name="__main__")
    assert "P = 1e5" in capsys.readouterr().out
