"""The documents, cut into what the tests look at: fenced blocks, links and headings."""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import linecache
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text without the fence's indentation, and the line it starts on."""

    language: str
    text: str
    line: int
    output: str | None
    """Of a python block: the text block that follows it directly, which is what it prints."""
    needs: tuple[str, ...] = ()
    """Packages that need not be installed, named above it as `<!-- needs: transformers peft -->`."""

    def prints(self, text: str) -> bool:
        """Whether `text` is the output that the page shows; "..." in it stands for anything."""
        return self.output is None or doctest.OutputChecker().check_output(self.output, text, doctest.ELLIPSIS)


def documents() -> list[Path]:
    """Every Markdown document: those of the root and those of docs/."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def name(page: Path) -> str:
    """The page's path as a test id."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of `page`, in order."""
    source = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(source))
    result = []
    for index, match in enumerate(found):
        after = found[index + 1] if index + 1 < len(found) else None
        is_output = (
            after is not None and after["language"] == "text" and not source[match.end() : after.start()].strip()
        )
        above = source[found[index - 1].end() if index else 0 : match.start()]
        named = re.search(r"^<!-- needs: ([\w ]+) -->$", above, re.M)
        result.append(
            Block(
                language=match["language"],
                text=_dedent(match["body"], match["indent"]),
                line=source.count("\n", 0, match.start()) + 2,
                output=_dedent(after["body"], after["indent"]) if after is not None and is_output else None,
                needs=tuple(named[1].split()) if named else (),
            )
        )
    return result


class NotInstalledError(Exception):
    """A package that the rest of a page needs."""


def run(page: Path) -> Iterator[tuple[Block, str]]:
    """Runs the python blocks of `page` in one namespace, in order; yields each with what it printed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language != "python":
            continue
        missing = [package for package in block.needs if importlib.util.find_spec(package) is None]
        if missing:
            raise NotInstalledError(f"{name(page)}: from line {block.line} on it needs {', '.join(missing)}")
        printed = io.StringIO()
        place = f"{name(page)}:{block.line}"
        # Tracebacks show the document's own lines, and `inspect` finds the source there, too.
        linecache.cache[place] = (len(block.text), None, block.text.splitlines(keepends=True), place)
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, place, "exec"), namespace)
        yield block, printed.getvalue()


def prose(page: Path) -> str:
    """The text of `page` without fenced blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def links(page: Path) -> Iterator[str]:
    """Targets of the inline links and images of `page`."""
    for match in re.finditer(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", prose(page)):
        yield match[1]


def anchors(page: Path) -> set[str]:
    """The anchors that the site's table of contents gives to the headings of `page`."""
    headings = re.findall(r"^#{1,6} +(.*?)\s*$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def _dedent(text: str, indent: str) -> str:
    return "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))


def print_help(scripts: list[Path], output: Path) -> None:
    """Writes what every program says to --help; for a process of its own, which ends with an error where one does.

    What a folder's programs import from beside them goes again with them: other folders have modules of the same names.
    """
    path = list(sys.path)
    with output.open("w") as file, contextlib.redirect_stdout(file):
        for script in scripts:
            sys.path[:], sys.argv, before = [str(script.parent), *path], [str(script), "--help"], set(sys.modules)
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(f"{script} --help ended with {end.code}") from end
            for name in set(sys.modules) - before:
                source = getattr(sys.modules[name], "__file__", None) or ""
                if source.startswith(str(ROOT)) and ".venv" not in source and not name.startswith("gradconsist"):
                    del sys.modules[name]


def program(name: str) -> ModuleType:
    """A program by its path without the ending, as a module."""
    path = ROOT / f"{name}.py"
    if str(path.parent) not in sys.path:  # as where it is run
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
