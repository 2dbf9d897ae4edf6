"""Installs what is released, as a stranger would, and runs the tests of each part against it.

    python tests/slow/installations.py --list              # the rows
    python tests/slow/installations.py                     # all of them: hours, and 6 GB of disk at a time
    python tests/slow/installations.py --only core-3.10    # one; the other rows of the result file are kept

Wheel and source archive are built once, by `build` and from the archive, and checked by `twine`. Each row then gets a
virtual environment of its own, of the Python that it names (`python3.10` to `python3.13` must be on the PATH), with the
wheel or the archive and its extra in it. Tests come from the unpacked archive, in a folder away from the repository, so
that nothing but what is released is seen. A row passes if every command of it does.

Results go to benchmarks/results/installations.json after each row; docs/installation.md shows them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/shared"))
from environment import write_result

RESULT = ROOT / "benchmarks" / "results" / "installations.json"
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
# What imports here imports for every user; isolated, so that no folder stands in for the package.
IMPORT = ("-I", "-c", "import gradconsist; print(gradconsist.__version__)")
SOME = (
    "-m", "pytest", "tests/core/methods", "tests/core/test_exactness.py", "tests/core/forward/test_isolation.py",
    "tests/core/engines/test_conditions.py", "tests/core/test_trust.py", "tests/core/refusals/test_graph.py",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One environment.

    Attributes:
        name: its name in the result.
        python: the interpreter's version.
        torch: a pin, or "" for what the package's own bound gives.
        extra: extras of the package that are installed with it, or "".
        archive: whether the source archive is installed, not the wheel.
        commands: what must succeed there, as arguments of its Python.
    """

    name: str
    python: str
    torch: str = ""
    extra: str = ""
    archive: bool = False
    commands: tuple[tuple[str, ...], ...] = (SOME,)


# Oldest with oldest, newest with newest, and between them torch 2.13.0, the one with a build for CPUs alone. All other
# tests: `make test-core` with another CORE_TORCH and PYTHON.
ROWS = (
    Row("core-3.10", "3.10", "2.6.0"),
    Row("core-3.11", "3.11", "2.13.0"),
    Row("core-3.12", "3.12", "2.13.0", archive=True),
    Row("core-3.13", "3.13"),
    Row("examples", "3.11", extra="examples", commands=(("-m", "pytest", "tests/examples"), ("examples/demo.py",))),
    Row("lightning", "3.12", extra="lightning",
        commands=(("-m", "pytest", "tests/adapters/test_lightning.py", "tests/adapters/test_lightning_object.py"),)),
    Row("usb", "3.11", extra="usb", commands=(("-m", "pytest", "tests/usb"),)),
    Row("peers", "3.11", extra="peers",
        commands=(("-c", "import opacus, backpack, torchjd, timm"), ("benchmarks/cost/measure_peers.py", "--quick"))),
    Row("docs", "3.11", "2.13.0", extra="docs",
        commands=(("-m", "mkdocs", "build", "--strict"), ("-m", "pytest", "tests/docs/test_site.py"))),
    Row("dev", "3.11", extra="dev",
        commands=(("-m", "ruff", "check", "."), ("-m", "ruff", "format", "--check", "."), ("-m", "mypy"),
                  ("-m", "pytest", "tests/adapters"))),
)  # fmt: skip


def main() -> int:
    """Builds, then goes through the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[row.name for row in ROWS], help="these rows")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of pytest (default: one a core)")
    parser.add_argument("--folder", type=Path, help="where environments are made (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    if options.list:
        for row in rows:
            print(f"{row.name:14} python {row.python:5} torch {row.torch or 'newest':7} {row.extra}")
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        built = build(Path(place))
        known = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
        done = {row["name"]: row for row in known}
        for row in rows:
            done[row.name] = outcome = run(row, Path(place), built["files"], options.processes)
            print(f"{row.name:14} {'passed' if outcome['passed'] else 'FAILED'}  {outcome['said']}", flush=True)
            ordered = [done[row.name] for row in ROWS if row.name in done]
            write_result(options.output, {"built": built["sizes"], "rows": ordered})
    return 0 if all(done[row.name]["passed"] for row in rows) else 1


def build(place: Path) -> dict[str, Any]:
    """The archive, and the wheel made from it; their sizes; both accepted by twine."""
    python = new_environment(place / "builder", f"{sys.version_info[0]}.{sys.version_info[1]}")
    said(python, (*PIP, "install", "--quiet", "build", "twine"), place)
    said(python, ("-m", "build", "--outdir", str(place / "dist"), str(ROOT)), place)
    files = {path.suffix: path for path in (place / "dist").iterdir()}
    said(python, ("-m", "twine", "check", "--strict", *map(str, files.values())), place)
    with tarfile.open(files[".gz"]) as archive:
        archive.extractall(place / "source", filter="data")
    sizes = [
        {"file": re.sub(r"-\d[^-]*?(?=-py3|\.tar)", "-VERSION", path.name), "kB": round(path.stat().st_size / 1000),
         "files": len(members(path))}
        for path in sorted(files.values())
    ]  # fmt: skip
    return {"files": files, "sizes": sizes}


def members(path: Path) -> list[str]:
    """The files inside a wheel or an archive."""
    if path.suffix == ".gz":
        with tarfile.open(path) as archive:
            return [member.name for member in archive if member.isfile()]
    with zipfile.ZipFile(path) as wheel:
        return wheel.namelist()


def run(row: Row, place: Path, files: dict[str, Path], processes: int) -> dict[str, Any]:
    """One row, from an empty environment."""
    environment, source = place / row.name, next((place / "source").iterdir())
    start = time.monotonic()
    outcome: dict[str, Any] = {
        "name": row.name, "python": row.python, "extra": row.extra, "passed": False,
        "what": "archive" if row.archive else "wheel", "ran": "; ".join(spoken(each) for each in row.commands),
        "sha256": hashlib.sha256(files[".gz"].read_bytes()).hexdigest(), "said": "",
    }  # fmt: skip
    try:
        python = new_environment(environment, row.python)
        package = str(files[".gz" if row.archive else ".whl"])
        pin = [f"torch=={row.torch}"] if row.torch else []
        if not row.extra:  # nothing but what the package itself asks for
            said(python, (*PIP, "install", "--quiet", *pin, package), place)
            outcome["packages"] = packages(python, place)
            outcome["MB"] = megabytes(environment)
            said(python, IMPORT, place)
        extras = ",".join(filter(None, [row.extra, "test"]))
        said(python, (*PIP, "install", "--quiet", *pin, f"{package}[{extras}]"), place)
        said(python, (*PIP, "check"), place)
        outcome.setdefault("MB", megabytes(environment))
        outcome["torch"] = said(python, ("-c", "import torch; print(torch.__version__)"), place)
        outcome["install_seconds"] = round(time.monotonic() - start)
        for command in row.commands:
            where = ("--numprocesses", str(processes), "--dist", "worksteal") if "pytest" in command else ()
            line = said(python, (*command, *where), source).strip("= ")
            if where or not outcome["said"]:  # tests say most
                outcome["said"] = line
        outcome["passed"] = True
    except subprocess.CalledProcessError as error:
        text = error.output or str(error)
        print(text[-6000:], file=sys.stderr)
        outcome["said"] = last_line(text).strip("= ")
    finally:
        shutil.rmtree(environment, ignore_errors=True)
    return outcome | {"seconds": round(time.monotonic() - start)}


def new_environment(folder: Path, version: str) -> Path:
    """An empty virtual environment of a Python; its interpreter."""
    found = shutil.which(f"python{version}")
    if found is None:
        raise SystemExit(f"No python{version} on the PATH; rows that need it: --list.")
    subprocess.run([found, "-m", "venv", "--clear", str(folder)], check=True)
    return folder / "bin" / "python"


def said(python: Path, arguments: Sequence[str], folder: Path) -> str:
    """Runs a command of an environment and gives the last line that it printed.

    Raises:
        subprocess.CalledProcessError: Where it fails, with what it printed.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "VIRTUAL"))}
    kept["PATH"] = f"{python.parent}{os.pathsep}{kept['PATH']}"
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=True,
    )  # fmt: skip
    return last_line(done.stdout)


def spoken(command: Sequence[str]) -> str:
    """A command as one would say it."""
    return " ".join(part for part in command if part not in {"-m", "-c"})


def last_line(text: str) -> str:
    """The last line with something on it, without colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")


def packages(python: Path, folder: Path) -> list[str]:
    """What is installed beside pip and setuptools, by name."""
    listed = json.loads(said(python, (*PIP, "list", "--format", "json"), folder))
    return sorted(each["name"] for each in listed if each["name"] not in {"pip", "setuptools"})


def megabytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return round(sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6)


if __name__ == "__main__":
    sys.exit(main())
