"""What must hold for every file of the repository."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from pages import ROOT, documents

import gradconsist

# Spelled in two halves, so that this file does not contain what it forbids.
FORBIDDEN = [
    re.compile(first + second)
    for first, second in [
        ("/wo", "rk/"), ("/tmp/e", "nvs"), ("/tmp/b", "rief"), ("/opt/p", "ypi"), ("/opt/wh", "eels"), ("/root", "/"),
        (r"pypi\.", "org"), (r"pythonho", "sted"), (r"download\.py", "torch"), (r"registry\.np", "mjs"),
    ]
]  # fmt: skip
BESIDE = re.compile(r"\.\./sha" + "red")
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FOLDERS = ("src", "examples", "benchmarks", "tests/slow", "docs/generators")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _tracked() -> list[Path]:
    """What git tracks or would track; every file where git is not at hand (an unpacked source archive)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git does not know this folder")
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # pictures


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_file_names_a_machine_or_a_registry() -> None:
    for path in _tracked():
        for pattern in FORBIDDEN:
            assert not pattern.search(_text(path)), f"{_id(path)} contains {pattern.pattern}"


def test_the_real_images_are_looked_for_in_one_place() -> None:
    """The optional folder of real images has its path in one file; everything else asks that file."""
    assert len([path for path in _tracked() if BESIDE.search(_text(path))]) <= 1


def test_no_large_or_generated_file_is_tracked() -> None:
    for path in _tracked():
        assert path.stat().st_size < 2**20, f"{_id(path)} is larger than 1 MiB"
        assert path.suffix not in {".pyc", ".pt", ".pth", ".whl"}, _id(path)


def test_the_version_is_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", gradconsist.__version__)
    # A result file records the version that it was made with, and keeps it.
    sources = [path for path in _tracked() if not _id(path).startswith("benchmarks/results/")]
    repeated = [_id(path) for path in sources if gradconsist.__version__ in _text(path)]
    assert repeated == ["src/gradconsist/__init__.py"] or repeated == ["CHANGELOG.md", "src/gradconsist/__init__.py"]


def test_the_changelog_knows_the_version() -> None:
    changelog = _text(ROOT / "CHANGELOG.md")
    assert "## [Unreleased]" in changelog or f"## [{gradconsist.__version__}]" in changelog


def test_the_documents_name_extras_that_exist() -> None:
    section = _text(ROOT / "pyproject.toml").split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^([a-z]+) = \[", section, re.M))
    for page in documents():
        for group in re.findall(r"(?:gradconsist|['\"\s]\.)\[([a-z,]+)\]", _text(page)):
            assert set(group.split(",")) <= extras, f"{_id(page)} names the extra {group}"


def test_every_dependency_bound_has_a_reason() -> None:
    """A requirement with a bound stands under a comment, or in a group that does."""
    lines = _text(ROOT / "pyproject.toml").splitlines()
    for number, line in enumerate(lines):
        if re.match(r'\s+"[A-Za-z].*(>=|==|<)', line):
            group = next(i for i in range(number, -1, -1) if lines[i].rstrip().endswith("["))
            above = [lines[number - 1].strip(), lines[group - 1].strip()]
            reason = any(earlier.startswith("#") for earlier in above)
            assert reason, f"pyproject.toml:{number + 1} has a bound without a reason: {line.strip()}"


def test_no_assert_in_the_library() -> None:
    """`python -O` drops asserts; a user's mistake gets an error of our own family, and nothing else differs there."""
    for path in SOURCES:
        asserts = [node.lineno for node in ast.walk(ast.parse(_text(path))) if isinstance(node, ast.Assert)]
        assert not asserts, f"{_id(path)} asserts in lines {asserts}"
        assert "__debug__" not in _text(path), _id(path)
        assert "sys.flags" not in _text(path), _id(path)


def _calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in `path` with the dotted name that it goes by."""
    return [(ast.unparse(node.func), node) for node in ast.walk(ast.parse(_text(path))) if isinstance(node, ast.Call)]


def test_nothing_loads_code_from_data() -> None:
    refused = {
        "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "eval", "exec", "marshal.loads", "joblib.load",
    }  # fmt: skip
    for path, called, node in [(each, *call) for each in PYTHON for call in _calls(each)]:
        assert called not in refused, f"{_id(path)}:{node.lineno} calls {called}"
        if called == "torch.load":
            only = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("weights_only")
            assert only == "True", f"{_id(path)}:{node.lineno}: torch.load without weights_only=True"
        for keyword in node.keywords:
            shell = keyword.arg == "shell" and ast.unparse(keyword.value) == "True"
            assert not shell, f"{_id(path)}:{node.lineno} runs a shell"


def test_files_stay_short() -> None:
    for path in PYTHON:
        assert len(_text(path).splitlines()) <= 350, f"{_id(path)} is longer than 350 lines: split it"
