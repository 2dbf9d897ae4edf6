"""Writes into a page what its code prints now: python tests/docs/refresh.py docs/guides/errors.md ...

For wording that changed on purpose. Read the difference before you keep it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pages import run


def refresh(page: Path) -> int:
    """Replaces each shown output that no longer holds; returns how many there were."""
    source, start, changed = page.read_text(encoding="utf-8"), 0, 0
    for block, printed in run(page):
        start = source.index(block.text, start) + len(block.text)
        if block.output is not None and not block.prints(printed):
            shown = source.index(block.output, start)
            source = source[:shown] + printed + source[shown + len(block.output) :]
            changed += 1
    page.write_text(source, encoding="utf-8")
    return changed


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}: {refresh(Path(argument).resolve())} outputs changed")
