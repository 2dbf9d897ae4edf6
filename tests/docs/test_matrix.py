"""The program behind the matrix: it measures, goes on where it stopped, and sees what is wrong."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pages import ROOT

from gradconsist.engines import LoopEngine
from gradconsist.engines.base import Problem
from gradconsist.types import GradProducts


class Wrong(LoopEngine):
    """Right in value; the derivative of one of the three products is missing."""

    def products(self, problem: Problem) -> GradProducts:
        right = super().products(problem)
        return right._replace(strong=right.strong.detach())


class Broken(LoopEngine):
    """An error that is not the library's own."""

    def products(self, problem: Problem) -> GradProducts:
        raise RuntimeError("a bug")


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "slow"))
    import matrix as program

    yield program
    for name in ("matrix", "matrix_cells", "environment"):
        sys.modules.pop(name, None)


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()[1:]]


@pytest.mark.filterwarnings("ignore")
def test_cells_are_measured_kept_and_not_measured_again(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, output = tmp_path / "cells.jsonl", tmp_path / "matrix.json"
    common = ["--rows", "^(mlp|checkpointed|embedding_bag)$", "--precisions", "float64", "bfloat16 autocast"]
    common += ["--engines", "loop", "ghost", "--log", str(log)]
    assert matrix.main(common) == 0
    assert "silently wrong: 0" in capsys.readouterr().out
    verdicts = {tuple(line["key"]): line["verdict"] for line in _lines(log)}
    assert len(verdicts) == 12
    assert verdicts["mlp", "ghost", "float64"] == verdicts["mlp", "loop", "bfloat16 autocast"] == "pass"
    assert verdicts["checkpointed", "ghost", "float64"] == "pass"
    assert verdicts["embedding_bag", "loop", "float64"] == "refused"
    # A kill in the middle of a line costs that cell, and no other.
    log.write_text(log.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    measured: list[tuple[str, str]] = []
    cell = matrix.cell
    monkeypatch.setattr(matrix, "cell", lambda r, *a, **k: measured.append((r.case.name, *a)) or cell(r, *a, **k))
    assert matrix.main([*common, "--resume", "--output", str(output)]) == 0
    assert measured == [("embedding_bag", "ghost", "bfloat16 autocast")]
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["counts"] == {"pass": 8, "refused": 4}
    assert result["cells"]["mlp"]["float64"]["ghost"].startswith("pass 4 ")
    assert result["cells"]["embedding_bag"]["float64"]["loop"].startswith("refused 4 UnsupportedModuleError: ")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("row", "engine", "found"),
    [
        ("mlp", Wrong, "gradient .* > 1.0e-08"),
        ("mlp", Broken, "raised RuntimeError: a bug"),
        ("mlp", None, "not refused"),
        ("gru", "vmap", "refused, which was not expected"),
    ],
    ids=["wrong derivative", "error", "no refusal", "refusal"],
)
def test_what_is_wrong_is_seen(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, engine: Any, found: str
) -> None:
    if engine is None:
        monkeypatch.setattr(matrix, "REFUSED", {row})
    else:
        monkeypatch.setitem(matrix.ENGINES, "loop", (lambda: engine) if isinstance(engine, str) else engine)
    log = tmp_path / "cells.jsonl"
    names = ["--rows", f"^{row}$", "--engines", "loop", "--precisions", "float64"]
    assert matrix.main([*names, "--log", str(log)]) == 1
    (line,) = _lines(log)
    assert line["verdict"] == "wrong"
    assert re.search(found, line["reason"]), line["reason"]


def test_an_expected_failure_is_strict(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "XFAIL", [("mlp", "loop", "float64", "pytorch#1")])
    case = next(case for _, case in matrix.rows() if case.name == "mlp")
    references = matrix.References(case, 3)
    passes = matrix.cell(references, "loop", "float64", quick=True)
    assert (passes.verdict, passes.reason) == ("wrong", "passes, though it is listed as a bug: pytorch#1")
    monkeypatch.setitem(matrix.ENGINES, "loop", Wrong)
    fails = matrix.cell(references, "loop", "float64", quick=True)
    assert fails.verdict == "xfail"
    assert fails.reason.startswith("pytorch#1: ")


def test_beyond_the_bounds_with_the_oracle_is_counted_apart(matrix: ModuleType) -> None:
    """Float32 that misses the bound is held against the oracle's own float32, and is no pass."""
    case = next(case for _, case in matrix.rows() if case.name == "mlp")
    references = matrix.References(case, 3)
    import matrix_cells

    references.same = lambda name, draw, projection: {"gradient": 1e-3, "cosine": 0.0}  # type: ignore[method-assign]

    def judged(error: float) -> str:
        cell = matrix_cells.Cell("pass", 1, {"gradient": error})
        return str(matrix_cells._judged(cell, references, "float32").verdict)

    assert [judged(1e-4), judged(2.9e-3), judged(3.1e-3), judged(float("nan"))] == ["pass", "dtype", "wrong", "wrong"]
