"""Runs examples/tour.ipynb and writes it, with its outputs, to docs/notebook.md and docs/assets/notebook_*.png.

    python docs/generators/notebook_page.py

It takes a minute.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
PAGE = ROOT / "docs" / "notebook.md"
# Runs below each cell: its pictures are saved, and their names end what it printed.
_AFTER = """
for number in plt.get_fignums():
    pictures = globals().get("pictures", 0) + 1
    plt.figure(number).savefig(f"docs/assets/notebook_{pictures}.png", dpi=80)
    print(f"![What the cell above draws](assets/notebook_{pictures}.png)")
plt.close("all")
print("=== end of a cell")
"""


def text_of(cell: dict[str, Any]) -> str:
    """A cell as Markdown, with links from the page's place."""
    source = "".join(cell["source"])
    return f"```python\n{source}\n```" if cell["cell_type"] == "code" else source.replace("](../docs/", "](")


def main() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = "import matplotlib\n\nmatplotlib.use('Agg')\n" + "".join(f"{code}\n{_AFTER}" for code in codes)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    outputs = iter(done.stdout.split("=== end of a cell\n"))
    parts = []
    for cell in cells:
        parts.append(text_of(cell))
        if cell["cell_type"] == "code":
            printed, pictures = re.fullmatch(r"(.*?)((?:^!\[.*\n)*)", next(outputs), re.M | re.S).groups()  # type: ignore[union-attr]
            parts += [f"```text\n{printed}```"] * bool(printed) + [pictures.rstrip("\n")] * bool(pictures)
    title, _, rest = parts[0].partition("\n\n")
    note = "*`examples/tour.ipynb` with its outputs, written by `python docs/generators/notebook_page.py`.*"
    PAGE.write_text("\n\n".join([title, note, rest, *parts[1:]]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
