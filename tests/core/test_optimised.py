"""Under `python -O` asserts vanish: no check of the library may be one, and every refusal is still there."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "src" / "gradconsist"

_PROGRAM = """
import re, sys, warnings
warnings.simplefilter("ignore")
assert False, "asserts are still there"
import core.inputs.test_bad_inputs as bad
from gradconsist import GradientConsistencyLoss
if "torch._dynamo" in sys.modules:
    sys.exit("importing the library imports the compiler")
refused = 0
for row in bad.TABLE:
    slow = (40, 41, 42, 43, 46)  # compilers, process groups
    if not isinstance(row, (bad.Bad, bad.Refused)) or row.number in slow:
        continue
    p = bad.CASES[row.problem].problem()
    try:
        if isinstance(row, bad.Bad):
            arguments = {"weak": p.weak, "strong": p.strong, "target": p.target}
            row.change(arguments)
            GradientConsistencyLoss(p.model)(**arguments)
        else:
            row.act(p)
    except row.error as error:
        if not re.search(row.match, str(error)):
            sys.exit(f"{row.number} said {error}")
    else:
        sys.exit(f"{row.number} was accepted")
    refused += 1
print(refused)
"""


def test_every_refusal_holds_without_asserts() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(TESTS)])}
    command = [sys.executable, "-O", "-c", _PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "46"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_check_is_an_assert(file: Path) -> None:
    assert not [node.lineno for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Assert)]
