"""Hatchling's hook for the README on the package's page, where a link into the repository would lead nowhere.

With `Source` under `[project.urls]` in pyproject.toml, links become absolute. Without it, as long as the project has no
public address, they become plain text and the pictures go.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface  # type: ignore[import-not-found,unused-ignore]


def on_package_page(text: str, source: str | None) -> str:
    """The README with links that work anywhere.

    Args:
        text: README.md.
        source: the address of the repository, or None.

    Returns:
        Markdown.
    """
    text = re.sub(r"<!--.*?-->\n*", "", text, flags=re.S)  # code that only the tests need
    local = r"\]\((?!\w+:|#)([^)\s]+)\)"
    if source:
        raw = source.replace("github.com", "raw.githubusercontent.com")
        text = re.sub(rf"(!\[[^\]]*){local}", rf"\1]({raw}/HEAD/\2)", text)
        return re.sub(local, rf"]({source}/blob/HEAD/\1)", text)
    text = re.sub(rf"!\[[^\]]*{local}\n*", "", text)
    return re.sub(rf"\[([^\]]*){local}", r"\1", text)


class PackagePage(MetadataHookInterface):  # type: ignore[misc,unused-ignore]
    """Hatchling calls it when it writes the metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the README.

        Args:
            metadata: the table `[project]`.
        """
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": on_package_page(text, metadata.get("urls", {}).get("Source")),
        }
