"""The README as the package's metadata has it: no link that leads nowhere."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest
from pages import ROOT, program


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook; hatchling itself is only there while a package is built."""
    stub = ModuleType("hatchling.metadata.plugin.interface")
    stub.MetadataHookInterface = object  # type: ignore[attr-defined]
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return program("package_page")


README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_with_an_address_every_link_is_absolute(page: ModuleType) -> None:
    text = page.on_package_page(README, "https://github.com/someone/something")
    links = LINK.findall(text)
    assert len(links) > 20
    assert all(link.startswith("https://") for link in links)
    assert "](https://raw.githubusercontent.com/someone/something/HEAD/docs/assets/idea.svg)" in text
    assert "[the tutorial](https://github.com/someone/something/blob/HEAD/docs/tutorial.md)" in text


def test_without_one_there_are_no_links(page: ModuleType) -> None:
    text = page.on_package_page(README, None)
    assert "the tutorial" in text
    assert LINK.findall(text) == []
    assert "![" not in text
    assert "<!--" not in text
