"""Run directories made by hand, with numbers that a person can check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_run(
    folder: Path,
    *,
    label: str = "fixmatch",
    seed: int = 0,
    accuracies: Sequence[float] = (0.5, 0.7),
    finished: bool = True,
    training: Sequence[dict[str, Any]] = (),
    timing: Sequence[tuple[int, float]] = (),
    split: str = "abc",
    **options: Any,
) -> Path:
    """A run with evaluations at steps 10, 20, ..."""
    folder.mkdir(parents=True)
    known = {"seed": seed, "dataset": "digits", "labels": 40, "steps": 10 * len(accuracies), **options}
    environment = {"torch": "2.0", "device": "cpu"}
    (folder / "config.json").write_text(json.dumps({"label": label, "options": known, "environment": environment}))
    (folder / "split.json").write_text(json.dumps({"sha256": split}))
    lines: list[dict[str, Any]] = [{"kind": "train", **record} for record in training]
    lines += [
        {"kind": "eval", "step": 10 * number, "test_accuracy": value} for number, value in enumerate(accuracies, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    times = [{"step": step, "seconds": seconds, "images_per_second": 80 * step / seconds} for step, seconds in timing]
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    if finished:
        ordered = sorted(accuracies[-20:])
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        summary = {"last": accuracies[-1], "median_last_20": middle, "best": max(accuracies), "seconds": 100.0}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
