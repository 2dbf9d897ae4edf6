"""The short form of `tests/slow/soak.py`: nothing is left behind, and a leak of any kind would be seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SEEN_BY = {"tensor": {"tensors", "objects", "malloc"}, "hook": {"hooks"}, "graph": {"malloc"}, "native": {"malloc"}}
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")


@pytest.fixture(scope="module")
def rows() -> dict[str | None, dict[str, Any]]:
    """One process of its own for all: the counts are of everything that is alive."""
    requests: list[dict[str, Any]] = [{"variant": "ghost", "steps": 160, "leak": None}]
    requests += [{"variant": "ghost", "steps": 40, "leak": leak} for leak in SEEN_BY]
    command = [sys.executable, str(ROOT / "tests" / "slow" / "soak.py"), "--one", json.dumps(requests)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {row["control"]: row for row in json.loads(done.stdout)}


def test_nothing_is_left_behind(rows: dict[str | None, dict[str, Any]]) -> None:
    row = rows[None]
    assert row["errors_survived"] == 2 * 160 // 5
    # Pages are too coarse for so few steps, and caches still fill: 20 to 51 bytes a step, and 1 over 2,000 steps.
    assert set(row["leaks"]) <= {"rss", "malloc", "blocks"}, row
    assert row["lines"]["malloc"]["slope"] < 200.0, row


@pytest.mark.parametrize("leak", SEEN_BY)
def test_a_leak_is_seen(rows: dict[str | None, dict[str, Any]], leak: str) -> None:
    assert SEEN_BY[leak] <= set(rows[leak]["leaks"])
    if "malloc" in SEEN_BY[leak]:
        assert rows[leak]["lines"]["malloc"]["slope"] > 200.0, rows[leak]
