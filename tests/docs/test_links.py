"""Links between pages, to headings and to files lead somewhere, in the repository and on the site."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import ROOT, anchors, documents, links, name


@pytest.mark.parametrize("page", documents(), ids=name)
def test_links_resolve(page: Path) -> None:
    for link in links(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        assert target.is_relative_to(ROOT), f"{name(page)} links out of the repository: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name(page)} links to a heading that is not there: {link}"


def test_every_page_can_be_reached() -> None:
    """A page outside the navigation and without a link to it would be published for nobody."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in documents()
        for link in links(page)
        if "://" not in link
    }
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in navigation or page in linked, name(page)
