"""What a seeded bug is, and how it gets into a copy of the source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class StaleError(Exception):
    """The text that a bug replaces is not in the source exactly once."""


@dataclass(frozen=True)
class Edit:
    """One replacement of text.

    Attributes:
        file: below ``src/gradconsist``.
        old: text that the file has exactly once.
        new: what stands there in the mutant.
    """

    file: str
    old: str
    new: str


class Bug:
    """One mutant of the library: a mistake that raises no error.

    Args:
        name: what was done wrong.
        breaks: the law that no longer holds.
        tests: the tests that are likely to see it, as pytest takes them, below ``tests/core``; they are run first.
        *edit: file, old text and new text, once or several times over.
    """

    def __init__(self, name: str, breaks: str, tests: str, *edit: str) -> None:
        self.name = name
        self.breaks = breaks
        self.tests = tests.split()
        self.edits = [Edit(*edit[at : at + 3]) for at in range(0, len(edit), 3)]

    def mutate(self, package: Path) -> dict[Path, str]:
        """The new texts of the files that it touches, by path.

        Args:
            package: the folder ``gradconsist``.

        Raises:
            StaleError: an old text is not there exactly once.
        """
        texts: dict[Path, str] = {}
        for edit in self.edits:
            path = package / edit.file
            text = texts.get(path) or path.read_text()
            if text.count(edit.old) != 1:
                raise StaleError(f"{self.name}: {edit.file} has {text.count(edit.old)} times {edit.old!r}, not once")
            texts[path] = text.replace(edit.old, edit.new)
        return texts
