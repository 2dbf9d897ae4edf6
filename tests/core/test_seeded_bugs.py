"""The table of seeded bugs fits the source: what tests/slow/seeded_bugs.py would otherwise find out after an hour."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from mutants import BUGS, Bug, StaleError

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "src" / "gradconsist"


def _fault(bug: Bug) -> str | None:
    try:
        for text in bug.mutate(PACKAGE).values():
            ast.parse(text)
    except (StaleError, SyntaxError) as error:
        return f"{bug.name}: {error}"
    return None


def test_every_bug_applies_exactly_once_and_is_python() -> None:
    faults = [fault for fault in map(_fault, BUGS) if fault]
    assert not faults, "\n".join(["mend these in tests/mutants:", *faults])


@cache
def _tests(file: str) -> set[str]:
    tree = ast.parse((HERE / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_tests_that_should_see_a_bug_are_there() -> None:
    hints = {(bug.name, *test.partition("[")[0].partition("::")[::2]) for bug in BUGS for test in bug.tests}
    gone = [hint for hint in hints if not (HERE / hint[1]).is_file() or (hint[2] and hint[2] not in _tests(hint[1]))]
    assert not gone
    assert {name for name, *_ in hints} == {bug.name for bug in BUGS}


def test_names_tell_bugs_apart() -> None:
    assert len({bug.name for bug in BUGS}) == len({str(bug.edits) for bug in BUGS}) == len(BUGS) >= 40


@pytest.mark.parametrize(("text", "times"), [("a = 1\n", 0), ("b = 2\nb = 2\n", 2)])
def test_a_bug_that_no_longer_applies_is_stale(text: str, times: int, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(StaleError, match=f"x.py has {times} times 'b = 2', not once"):
        Bug("name", "law", "test_loss.py", "x.py", "b = 2", "b = 3").mutate(tmp_path)
