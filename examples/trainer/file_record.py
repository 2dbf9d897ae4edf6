"""What is known of the files of a folder data set, and must be the same on resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

Manifest = dict[str, tuple[int, str]]


@dataclass
class FileRecord:
    """What is known of the files of a folder data set."""

    train: list[str]  # Names of the training files, below the data set's folder.
    manifest: Manifest  # Label and fingerprint of every file, by name: what must be the same on resume.
    # Name to reason of files that were damaged before the first step.
    left_out: dict[str, str] = field(default_factory=dict)
    # Indices of training files that went bad later, and of none of which a view is made.
    lost: frozenset[int] = frozenset()
    lost_tests: frozenset[int] = frozenset()  # The same of test files.
    reasons: dict[str, str] = field(default_factory=dict)  # Name to reason of the lost ones.
    notes: list[str] = field(default_factory=list)  # For people.
    # Names of files that show the same image, where it was looked for.
    twins: list[list[str]] = field(default_factory=list)

    def digest(self) -> str:
        """SHA-256 of the manifest."""
        return hashlib.sha256("".join(manifest_lines(self.manifest)).encode()).hexdigest()


def twins(prints: Iterable[tuple[str, str | bytes]]) -> list[list[str]]:
    """Names of equal fingerprints, where there are several."""
    names: dict[str | bytes, list[str]] = {}
    for name, mark in prints:
        names.setdefault(mark, []).append(name)
    return [group for group in names.values() if len(group) > 1]


def manifest_lines(manifest: Manifest) -> Iterable[str]:
    """A manifest as text, a file a line."""
    return (json.dumps([name, label, fingerprint]) + "\n" for name, (label, fingerprint) in manifest.items())
