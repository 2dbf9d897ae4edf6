"""Whatever the documents show as code runs, and prints what they say that it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import ROOT, NotInstalledError, blocks, documents, name, print_help, run

from support.processes import started

# docs/notebook.md has the cells of a notebook, which test_notebook.py runs.
PAGES = [
    page
    for page in documents()
    if any(block.language == "python" for block in blocks(page)) and page.name != "notebook.md"
]
LANGUAGES = {"python", "bash", "console", "text", "bibtex"}
# Everything with a command line: the trainers, and the measurements that have options.
PROGRAMS = sorted(
    path
    for pattern in ("examples/*.py", "benchmarks/**/*.py", "tests/slow/*.py", "docs/generators/*.py")
    for path in ROOT.glob(pattern)
    if re.search(r"argparse|parser\(__doc__\)|parse_\w+\(|\bstart\(", path.read_text(encoding="utf-8"))
)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft's use of it
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page share one namespace and an empty folder, and run in order."""
    monkeypatch.chdir(tmp_path)
    try:
        for block, printed in run(page):
            place = f"{name(page)}:{block.line}"
            assert block.prints(printed), f"{place} prints\n{printed}but the page says\n{block.output}"
    except NotInstalledError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("page", documents(), ids=name)
def test_every_block_names_a_known_language(page: Path) -> None:
    """A python block with a misspelt name would be shown and never run."""
    assert {block.language for block in blocks(page)} <= LANGUAGES


def _shell_text(page: Path) -> str:
    return "\n".join(block.text for block in blocks(page) if block.language in {"bash", "console"})


def _code_text(page: Path) -> str:
    """Commands and inline code: where options and targets are named."""
    return _shell_text(page) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")))


def test_make_targets_exist() -> None:
    named = {target for page in documents() for target in re.findall(r"\bmake ([a-z][a-z-]*)", _code_text(page))}
    offered = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert named <= offered
    assert {"demo", "test"} <= named


# Options of other programs that the documents name.
FOREIGN = {
    "--editable", "--strict", "--upgrade",
    "--max-restarts", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--standalone",
}  # fmt: skip


def test_options_exist(tmp_path: Path) -> None:
    """One test for all pages: the help of every program takes seconds."""
    pytest.importorskip("torchvision", reason="the examples need torchvision")
    helping = started(print_help, PROGRAMS, tmp_path / "help")
    helping.join(280)
    assert helping.exitcode == 0
    option = r"(?<![\w-])--[a-z][a-z0-9-]*"
    known = FOREIGN | set(re.findall(option, (tmp_path / "help").read_text()))
    unknown = {name(page): set(re.findall(option, _code_text(page))) - known for page in documents()}
    assert not {page: options for page, options in unknown.items() if options}


@pytest.mark.parametrize("page", documents(), ids=name)
def test_scripts_exist(page: Path) -> None:
    for script in re.findall(
        r"\b((?:examples|benchmarks|docs/generators|tests/slow)/[\w/]+\.py)", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / script).is_file(), f"{name(page)} names {script}"
