"""Pages that are written from result files say what the files say."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
from pages import ROOT, program


@pytest.fixture(scope="module")
def make_pages() -> ModuleType:
    return program("make_pages")


def test_the_evidence_page_is_fresh(make_pages: ModuleType) -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert page == make_pages.evidence(), "run: python benchmarks/make_pages.py"


def test_the_page_of_paired_runs_is_fresh(make_pages: ModuleType) -> None:
    page = (ROOT / "docs" / "does-it-help.md").read_text(encoding="utf-8")
    assert page == make_pages.does_it_help(), "run: python benchmarks/make_pages.py"


def test_the_page_of_the_matrix_is_fresh(make_pages: ModuleType) -> None:
    page = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")
    assert page == make_pages.matrix(), "run: python benchmarks/make_pages.py"


def test_the_scorecard_is_fresh(make_pages: ModuleType) -> None:
    page = (ROOT / "docs" / "scorecard.md").read_text(encoding="utf-8")
    assert page == make_pages.scorecard(), "run: python benchmarks/make_pages.py"


def test_the_page_of_costs_is_fresh(make_pages: ModuleType) -> None:
    page = (ROOT / "docs" / "guides" / "cost.md").read_text(encoding="utf-8")
    assert page == make_pages.cost(), "run: python benchmarks/make_pages.py"


def test_nothing_in_the_matrix_is_wrong(make_pages: ModuleType) -> None:
    result = make_pages._result("matrix")
    assert len(result["cells"]) >= 60
    assert result["counts"].get("wrong", 0) == 0


def test_the_table_of_the_usb_guide_is_fresh(make_pages: ModuleType) -> None:
    page = (ROOT / "docs" / "guides" / "usb.md").read_text(encoding="utf-8")
    result = make_pages._result("usb")
    assert page == make_pages.with_table(page, result), "run: python benchmarks/make_pages.py"
    assert all(row["bitwise"] for row in result["rows"])
    assert len(result["rows"]) == 9


def test_the_tables_of_the_trainer_guide_are_fresh(make_pages: ModuleType) -> None:
    page = (ROOT / "docs" / "guides" / "trainer.md").read_text(encoding="utf-8")
    results = make_pages.trainer_results()
    assert page == make_pages.with_tables(page, results), "run: python benchmarks/make_pages.py"
    assert page.count("<!-- input_pipeline:begin -->") == page.count("<!-- cifar_amp:begin -->") == 1
    runs = results["cifar_amp"]["runs"] if "cifar_amp" in results else []
    assert all(run["summary"]["steps"] == 2000 and run["options"]["ggcr_weight"] > 0 for run in runs)


def test_the_tables_of_the_imagenet_guide_are_fresh(make_pages: ModuleType) -> None:
    page = (ROOT / "docs" / "guides" / "imagenet.md").read_text(encoding="utf-8")
    assert page == make_pages.imagenet(page), "run: python benchmarks/make_pages.py"


def test_the_page_on_installing_is_fresh(make_pages: ModuleType) -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    assert page == make_pages.installation(page), "run: python benchmarks/make_pages.py"
    assert page.count("<!-- installations:begin -->") == 1


def test_what_is_claimed_was_installed(make_pages: ModuleType) -> None:
    """Python versions in the package's metadata, the oldest torch and every extra have a row that passed."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    passed = [row for row in make_pages._result("installations")["rows"] if row["passed"]]
    claimed = {c.rpartition(" ")[2] for c in project["classifiers"] if "Python :: 3." in c}
    core = [row for row in passed if not row["extra"]]
    assert claimed == {row["python"] for row in core}
    oldest = re.fullmatch(r"torch>=(\S+)", project["dependencies"][0]).group(1)
    assert any(row["torch"].startswith(f"{oldest}.") for row in core)
    extras = set(project["optional-dependencies"]) - {"test"}  # in every row
    assert extras == {row["extra"] for row in passed if row["extra"]}


def test_the_cost_table_of_the_readme_is_fresh(make_pages: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == make_pages.with_cost(readme), "run: python benchmarks/make_pages.py"


def test_the_tables_of_the_guide_on_the_paper_are_fresh(make_pages: ModuleType) -> None:
    pytest.importorskip("tqdm", reason="the tables are written by the examples")
    page = (ROOT / "docs" / "guides" / "reproduce-the-paper.md").read_text(encoding="utf-8")
    result = make_pages._result("reproduce_demo")
    assert page == make_pages.with_paper_tables(page, result), "run: python benchmarks/make_pages.py"
    assert set(result["tables"]) == {"main", "ablation", "lambda", "curves"}
