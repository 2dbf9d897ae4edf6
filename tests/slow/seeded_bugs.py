"""Seeded bugs: the share of known mistakes that the tests see.

    python tests/slow/seeded_bugs.py                       # all of tests/mutants; continues where it was stopped
    python tests/slow/seeded_bugs.py --only dilation eps   # those with one of these words in their name
    python tests/slow/seeded_bugs.py --quick               # every tenth, by the tests that should see it only

Each bug is applied to a copy of the tree, never to the tree itself. The tests that should see it run first, the one
that saw it last time before all others; the whole of tests/core only if they do not. A bug is killed if a test fails
that passes on a copy without a bug, which is tried for all of them at the end.

Results go to benchmarks/results/seeded_bugs.json after each bug; what is there for the same source and tests is not run
again. The exit status is 1 if a bug survives, no longer applies, or was killed by a test that also fails without it.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401  # for the forks
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks/shared", "tests")]
from environment import write_result

from mutants import BUGS, Bug, StaleError

RESULT = ROOT / "benchmarks" / "results" / "seeded_bugs.json"
COPIED = ("src", "tests", "examples", "benchmarks", "docs", "pyproject.toml", "README.md", "mkdocs.yml", "Makefile")
TABLE_TEST = "test_seeded_bugs.py"
_PATIENCE = 5400.0  # seconds that one run of tests may take; a bug that makes it hang counts as not seen by it
_STAMPS = itertools.count(1_000_000_000, 10)


@dataclass
class Outcome:
    """What became of one bug.

    Attributes:
        name: the bug's.
        breaks: the law that it breaks.
        verdict: "killed", "survived", "stale" (no longer applies) or "unsound" (its killer fails without it, too).
        by: the test that failed.
        how: the first line of its failure.
        likely: whether one of the tests that should see it did.
        seconds: of one processor, all its test runs together.
        tree: source, tests and bug that this holds for.
    """

    name: str
    breaks: str
    verdict: str
    by: str = ""
    how: str = ""
    likely: bool = True
    seconds: float = 0.0
    tree: str = ""


class Witness:
    """A pytest plugin that keeps the failures and the number of tests that passed."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str]] = []
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            how = (crash.message if crash is not None else str(report.longrepr)).strip().partition("\n")[0]
            if how == "AssertionError" and crash is not None:
                how = Path(crash.path).read_text().splitlines()[crash.lineno - 1].strip()
            self.failures.append((report.nodeid, how[:200]))
        self.passed += report.passed and report.when == "call"


def run_tests(copy: Path, tests: list[str], *, stop: bool = True) -> dict[str, Any]:
    """Runs tests of a copy in a fork of this process.

    Args:
        copy: root of the copy.
        tests: as pytest takes them.
        stop: whether to end at the first failure.

    Returns:
        Exit status, failures (test and first line), number of tests that passed, and processor seconds; no failure
        where it hangs.
    """
    said = copy / "said.json"
    said.unlink(missing_ok=True)
    shutil.rmtree(copy / ".hypothesis", ignore_errors=True)
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = _in_child(copy, tests, said, stop)
        except BaseException:
            (copy / "output.txt").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    end = time.monotonic() + _PATIENCE
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"status": 0, "failures": [], "passed": 0, "seconds": _PATIENCE}
        time.sleep(0.05)
    found = {"failures": [], "passed": 0, **(json.loads(said.read_text()) if said.exists() else {})}
    seconds = usage.ru_utime + usage.ru_stime
    return {"status": os.waitstatus_to_exitcode(status), "seconds": seconds, **found}


def _in_child(copy: Path, tests: list[str], said: Path, stop: bool) -> int:
    os.setpgid(0, 0)
    output = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = os.pathsep.join((str(copy / "src"), str(copy / "tests")))
    ours = ("gradconsist", "mutants", "support", "environment")
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    # Not this tree's sources; packages of an environment that lies in it stay.
    others = (path for path in sys.path if not path.startswith(str(ROOT)) or path.startswith(sys.prefix))
    sys.path[:] = [str(copy / "src"), *others]
    witness = Witness()
    options = ["-q", "-p", "no:cacheprovider", "--assert=plain", "--rootdir", str(copy), *(["-x"] if stop else [])]
    status = int(pytest.main([*options, *tests], plugins=[witness]))
    said.write_text(json.dumps({"failures": witness.failures, "passed": witness.passed}))
    return status


def make_copy(folder: Path) -> Path:
    """A copy of the tree, without the test that holds the table of bugs against the source: it would see them all."""
    ignore = shutil.ignore_patterns("__pycache__", ".*", "*.pyc", TABLE_TEST)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def fingerprint() -> str:
    """Of everything that decides over life and death, but for the bug itself."""
    digest = hashlib.sha256()
    for folder in ("src", "tests/core", "tests/support"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != TABLE_TEST:
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def judge(bug: Bug, copy: Path, last: str, *, rest: bool) -> Outcome:
    """Applies a bug to the copy, runs the tests (if `rest`, all that may be needed), and takes it back."""
    package = copy / "src" / "gradconsist"
    seconds = 0.0
    try:
        texts = bug.mutate(package)
    except StaleError as error:
        return Outcome(bug.name, bug.breaks, "stale", how=str(error))
    # One by one: pytest would run a file that is named beside one of its tests in the file's own order.
    runs = [*([last] if last else []), *(f"tests/core/{test}" for test in bug.tests)]
    before = {path: path.read_text() for path in texts}
    try:
        _write(texts)
        for tests in [*runs, "tests/core"] if rest else runs:
            found = run_tests(copy, [tests])
            seconds += found["seconds"]
            if found["failures"]:
                test, how = found["failures"][0]
                return Outcome(bug.name, bug.breaks, "killed", test, how, tests in runs, round(seconds, 1))
            if found["status"] not in (0, 4, 5):  # 4, 5: no such test any more
                raise RuntimeError(f"{bug.name}: pytest ended with {found['status']}, and said:\n{_said(copy)}")
    finally:
        _write(before)
    return Outcome(bug.name, bug.breaks, "survived", likely=False, seconds=round(seconds, 1))


def _write(texts: dict[Path, str]) -> None:
    """Each time with a time stamp of its own: a mutant of the same length must not meet the other's bytecode."""
    for path, text in texts.items():
        path.write_text(text)
        os.utime(path, (stamp := next(_STAMPS), stamp))


def _said(copy: Path) -> str:
    return (copy / "output.txt").read_text()[-3000:]


def known() -> dict[str, Outcome]:
    """What earlier runs found, by name."""
    if not RESULT.exists():
        return {}
    return {row["name"]: Outcome(**row) for row in json.loads(RESULT.read_text())["bugs"]}


def save(outcomes: dict[str, Outcome]) -> None:
    """Writes what is known, in the order of the table."""
    rows = [outcomes[bug.name] for bug in BUGS if bug.name in outcomes]
    killed = sum(row.verdict == "killed" for row in rows)
    result = {"seeded": len(rows), "killed": killed, "seconds": round(sum(row.seconds for row in rows), 1)}
    write_result(RESULT, {**result, "bugs": [asdict(row) for row in rows]})


def main() -> int:
    """Prints one line a bug and the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="bugs with one of these words in their name")
    parser.add_argument("--quick", action="store_true", help="every tenth bug, by its likely tests only")
    parser.add_argument("--likely", action="store_true", help="name those that the likely tests do not see, and go on")
    parser.add_argument("--again", action="store_true", help="also what is known for the same source and tests")
    options = parser.parse_args()
    chosen = BUGS[::10] if options.quick else BUGS
    if options.only:
        chosen = [bug for bug in BUGS if any(word in bug.name for word in options.only)]
    torch.func.vmap(torch.sin)(torch.zeros(1))  # imports a thousand modules, once for all forks
    gc.freeze()
    outcomes, tree, rest = known(), fingerprint(), not (options.quick or options.likely)
    with tempfile.TemporaryDirectory() as folder:
        copy = make_copy(Path(folder))
        for bug in chosen:
            own = hashlib.sha256(f"{tree}{bug.edits}".encode()).hexdigest()[:16]
            before = outcomes.get(bug.name)
            if before is None or before.tree != own or before.verdict != "killed" or options.again:
                outcomes[bug.name] = judge(bug, copy, before.by if before else "", rest=rest)
                outcomes[bug.name].tree = own
                save(outcomes)
            row = outcomes[bug.name]
            print(f"{row.verdict:8}  {row.seconds:6.1f} s  {row.name}  {row.by or row.how}", flush=True)
        rows = [outcomes[bug.name] for bug in chosen]
        unsound = _fail_without_a_bug(copy, rows)
        for row in rows:
            row.verdict = "unsound" if row.by in unsound else row.verdict
        save(outcomes)
    killed = sum(row.verdict == "killed" for row in rows)
    print(f"killed {killed} / seeded {len(rows)}")
    for row in rows:
        if row.verdict != "killed":
            print(f"{row.verdict}: {row.name} ({row.breaks}) {row.by or row.how}")
    return killed < len(rows)


def _fail_without_a_bug(copy: Path, rows: list[Outcome]) -> set[str]:
    """Killers that are no evidence, because they fail on a copy without a bug, or did not run there."""
    killers = sorted({row.by for row in rows if row.by})
    if not killers:
        return set()
    found = run_tests(copy, killers, stop=False)
    failed = {test for test, _ in found["failures"]}
    return set(killers) if found["passed"] + len(failed) < len(killers) else failed


if __name__ == "__main__":
    sys.exit(main())
