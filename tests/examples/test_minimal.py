"""`examples/minimal.py` trains, with the term, and rests on nothing but torch, scikit-learn and the library."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import minimal


def test_it_learns_with_the_term(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    term = minimal.GradientConsistencyLoss

    class Counted(term):
        def __call__(self, *args: object) -> object:
            calls.append(args)
            return super().__call__(*args)

    monkeypatch.setattr(minimal, "GradientConsistencyLoss", Counted)
    monkeypatch.setattr(minimal, "WARMUP", 50)
    assert minimal.main(steps=60) > 0.5
    assert len(calls) == 10
    assert "accuracy on 500 test digits: " in capsys.readouterr().out


def test_it_imports_nothing_from_the_trainers() -> None:
    tree = ast.parse(Path(minimal.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    packages = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert packages == {"torch", "sklearn", "gradconsist"}
