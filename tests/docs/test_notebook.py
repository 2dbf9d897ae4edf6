"""examples/tour.ipynb runs from top to bottom, says what its text says, and leads to pages that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, blocks, program

NOTEBOOK = ROOT / "examples" / "tour.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_it_runs(
    cells: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the notebook draws with matplotlib (extra: examples)")
    pytest.importorskip("sklearn", reason="the notebook's images are scikit-learn's (extra: examples)")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    names: dict[str, Any] = {}
    try:
        for cell in cells:
            if cell["cell_type"] == "code":
                code = source(cell).replace("steps: int = 200", "steps: int = 50")  # past the warm-up, and no more
                exec(compile(code, f"{NOTEBOOK.name}:{cell['id']}", "exec"), names)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)
        pyplot.close("all")
    printed = capsys.readouterr().out
    assert "exact, by GhostEngine" in printed
    assert "agrees with finite differences" in printed
    plain, with_term = names["plain"], names["with_term"]
    assert plain["step"] == with_term["step"] == [10, 20, 30, 40, 50]
    assert plain["accuracy"][:4] == with_term["accuracy"][:4]  # "bit by bit": the term begins after 40 steps
    assert max(plain["accuracy"]) > 0.3


def test_it_is_stored_without_outputs(cells: list[dict[str, Any]]) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)


def test_the_page_is_the_notebook(cells: list[dict[str, Any]]) -> None:
    """docs/notebook.md has every cell, in order, and what the notebook prints."""
    writer = program("docs/generators/notebook_page")
    page = writer.PAGE.read_text(encoding="utf-8")
    place = 0
    for cell in cells:
        words = writer.text_of(cell).partition("\n")[2]  # the first page of text has a line more after its heading
        place = page.find(words.strip(), place)
        assert place >= 0, f"run: python docs/generators/notebook_page.py ({cell['id']})"
    shown = [block.output for block in blocks(writer.PAGE) if block.output]
    assert any("exact, by GhostEngine" in output for output in shown)
    assert any("agrees with finite differences" in output for output in shown)
    pictures = re.findall(r"\]\((assets/notebook_\d+\.png)\)", page)
    assert len(pictures) == 3
    assert all((writer.PAGE.parent / picture).exists() for picture in pictures)


def test_its_links_lead_somewhere(cells: list[dict[str, Any]]) -> None:
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(map(source, cells)))
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []
