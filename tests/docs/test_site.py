"""The site builds without a warning and needs nothing from another host."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pages import ROOT

import gradconsist
from gradconsist import diagnostics, engines, errors, methods
from gradconsist.adapters import lightning, usb

pytest.importorskip("mkdocs", reason="the site needs the docs extra")
pytest.importorskip("mkdocstrings", reason="the site needs the docs extra")


def is_built() -> bool:
    """Whether `make docs` succeeded after the last change of what the site is made from."""
    stamp = ROOT / "site" / ".strict"
    sources = [ROOT / "mkdocs.yml", *(ROOT / "docs").rglob("*"), *(ROOT / "src").rglob("*")]
    changed = (path.stat().st_mtime for path in sources if "__pycache__" not in path.parts)
    return stamp.exists() and stamp.stat().st_mtime > max(changed)


def test_the_site(tmp_path: Path) -> None:
    """One test for all, since each worker would build the site for itself."""
    site = ROOT / "site"
    if not is_built():
        site = tmp_path
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
        built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
        assert built.returncode == 0, built.stderr
    nothing_is_loaded_from_another_host(site)
    no_formula_is_taken_for_html(site)
    formulas_are_drawn(site)
    the_first_page_has_version_and_install_line(site)
    the_appendix_is_not_searched(site)
    reference_covers_the_public_names(site)


def nothing_is_loaded_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?(?:https?:)?(//[^\"\s>]+)", html)
        assert not loaded, f"{page.relative_to(site)} loads {loaded}"


def no_formula_is_taken_for_html(site: Path) -> None:
    """Outside code, Markdown passes `<g_w, g_s>` through as an element, and the browser shows nothing."""
    for page in site.rglob("*.html"):
        opened = set(re.findall(r"<([a-zA-Z][^\s>/]*)", page.read_text(encoding="utf-8")))
        strange = {tag for tag in opened if not re.fullmatch(r"[a-z]+[1-6]?", tag)}
        assert not strange, f"{page.relative_to(site)} contains the elements {strange}: use code style for them"


def formulas_are_drawn(site: Path) -> None:
    """Of pages and of docstrings, with no TeX and no plain text left."""
    first, loss = ((site / page / "index.html").read_text(encoding="utf-8") for page in (".", "api"))
    assert "<mfrac>" in first
    assert "<munder><mo>&sum;</mo>" in first
    assert '<div class="formulas">' in loss
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert "arithmatex" not in html, page
        assert "sum over pairs u of" not in html, page


def the_first_page_has_version_and_install_line(site: Path) -> None:
    first = (site / "index.html").read_text(encoding="utf-8")
    assert f"Version {gradconsist.__version__}" in first
    assert "pip install" in re.sub("<.*?>", "", first)


def the_appendix_is_not_searched(site: Path) -> None:
    found = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    assert any(entry["location"].startswith("evidence/") for entry in found)
    assert not any(entry["location"].startswith("appendix/") for entry in found)


def _public_names(module: ModuleType) -> list[str]:
    """Classes and functions of `__all__`, or, in a module without one, those defined there."""
    names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
    members = {name: getattr(module, name) for name in names}
    own = "__all__" in vars(module)
    return [n for n, m in members.items() if callable(m) and (own or getattr(m, "__module__", None) == module.__name__)]


def reference_covers_the_public_names(site: Path) -> None:
    """Every public name has an entry, so that a new one is not forgotten."""
    html = "".join(page.read_text(encoding="utf-8") for page in (site / "api").rglob("*.html"))
    for module in (gradconsist, methods, engines, diagnostics, errors, lightning, usb):
        for name in _public_names(module):
            assert re.search(rf'id="gradconsist(\.\w+)*\.{name}"', html), f"{module.__name__}.{name} is not on the site"
