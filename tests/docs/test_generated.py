"""Pages that are written from result files say what the files say, and the files what must hold."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
from pages import ROOT, program


@pytest.fixture(scope="module")
def make_pages() -> ModuleType:
    pytest.importorskip("tqdm", reason="some tables are written by the examples")
    return program("docs/generators/make_pages")


def test_the_pages_are_fresh(make_pages: ModuleType) -> None:
    written = make_pages.written()
    assert len(written) >= 15
    for page, expected in written.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text == expected, f"{page}: run python docs/generators/make_pages.py"
        begun, ended = (re.findall(rf"<!-- (\w+):{end} -->", text) for end in ("begin", "end"))
        assert begun == ended, f"{page}: markers come in pairs"
        assert len(set(begun)) == len(begun), f"{page}: and once"


def test_nothing_in_the_matrix_is_wrong(make_pages: ModuleType) -> None:
    result = make_pages.result_of("matrix")
    assert len(result["cells"]) >= 60
    assert result["counts"].get("wrong", 0) == 0


def test_every_usb_algorithm_is_bitwise(make_pages: ModuleType) -> None:
    result = make_pages.result_of("usb")
    assert all(row["bitwise"] for row in result["rows"])
    assert len(result["rows"]) == 9


def test_the_amp_runs_are_whole(make_pages: ModuleType) -> None:
    results = make_pages.trainer_results()
    runs = results["cifar_amp"]["runs"] if "cifar_amp" in results else []
    assert all(run["summary"]["steps"] == 2000 and run["options"]["ggcr_weight"] > 0 for run in runs)


def test_no_engine_was_wrong_and_no_name_left_out() -> None:
    sweeps = program("docs/generators/derivatives_page").sweeps()
    assert sweeps
    for version, result in sweeps.items():
        assert not result["wrong"]["library"], version
        assert not result["uncovered"], version


def test_no_kill_and_no_hostile_file_did_harm(make_pages: ModuleType) -> None:
    """Every killed run is equal, every forgotten item is noticed, every damaged file answered as it should be."""
    kills, hostile = make_pages.fault_results()
    assert kills["parts"]
    assert all(row["equal"] == row["runs"] for row in kills["parts"])
    assert all(row["noticed"] == (row["item"] != "nothing") for row in kills["control"])
    assert all(row["right"] == row["cases"] for row in hostile["rows"])
    page = (ROOT / "docs/guides/faults.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name}:begin -->" in page for name in ("kills", "control", "hostile"))


def test_the_tables_of_the_paper_are_all_there(make_pages: ModuleType) -> None:
    assert set(make_pages.result_of("reproduce_demo")["tables"]) == {"main", "ablation", "lambda", "curves"}


def test_what_is_claimed_was_installed(make_pages: ModuleType) -> None:
    """Python versions in the package's metadata, the oldest torch and every extra have a row that passed."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    passed = [row for row in make_pages.result_of("installations")["rows"] if row["passed"]]
    claimed = {c.rpartition(" ")[2] for c in project["classifiers"] if "Python :: 3." in c}
    core = [row for row in passed if not row["extra"]]
    assert claimed == {row["python"] for row in core}
    oldest = re.fullmatch(r"torch>=(\S+)", project["dependencies"][0]).group(1)
    assert any(row["torch"].startswith(f"{oldest}.") for row in core)
    extras = set(project["optional-dependencies"]) - {"test"}  # in every row
    assert extras == {row["extra"] for row in passed if row["extra"]}
