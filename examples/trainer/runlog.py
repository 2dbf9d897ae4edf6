"""What a run says: metrics.jsonl (exact, resumable), timing.jsonl (wall clock), and progress for people."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import gradconsist
from trainer.errors import CheckpointError
from trainer.files import regular_size

Number = float | Tensor


# Of a number whose name ends so, a step gives one for each image, and the log shows how they are spread.
SAMPLE = "_sample"
QUANTILES = {"q10": 0.1, "q50": 0.5, "q90": 0.9}


class Meter:
    """Means of named numbers over the steps since the last `flush`; NaN means "not in this step".

    A number named `NAME_sample` is a tensor `[B]`; instead of its mean, `flush` returns `NAME_q10`, `NAME_q50` and
    `NAME_q90`: quantiles over all images of all those steps together.

    Values stay on their device until they are needed, so that a GPU is not waited for in every step.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[Number]] = {}

    def add(self, numbers: dict[str, Number]) -> None:
        """Take the numbers of one step."""
        for name, value in numbers.items():
            self.values.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)

    def state_dict(self) -> dict[str, list[float]]:
        """All values since the last flush, as floats."""
        for name, values in self.values.items():
            each = (value.flatten().tolist() if isinstance(value, Tensor) else [value] for value in values)
            self.values[name] = list(itertools.chain.from_iterable(each))
        return {name: list(values) for name, values in self.values.items()}  # type: ignore[arg-type]

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore what `state_dict` returned."""
        self.values = {name: list(values) for name, values in state.items()}

    def flush(self) -> dict[str, float | None]:
        """Return the means and quantiles (None where a number never occurred) and start afresh."""
        numbers: dict[str, float | None] = {}
        for name, values in self.state_dict().items():
            real = [value for value in values if not math.isnan(value)]
            if name.endswith(SAMPLE):
                at = np.quantile(real, list(QUANTILES.values())).tolist() if real else [None] * len(QUANTILES)
                numbers |= {
                    f"{name.removesuffix(SAMPLE)}_{key}": value for key, value in zip(QUANTILES, at, strict=True)
                }
            else:
                numbers[name] = math.fsum(real) / len(real) if real else None
        self.values = {}
        return numbers


class MetricsFile:
    """metrics.jsonl: one JSON object per line, a function of the run's options alone.

    So many bytes with this SHA-256 belong to the checkpoint being resumed; what a killed process wrote later goes.
    """

    def __init__(self, path: Path, keep: int, sha256: str | None = None) -> None:
        self.path = path
        try:
            kept = path.read_bytes()[:keep] if keep and regular_size(path) else b""
        except (FileNotFoundError, ValueError):
            kept = b""
        self._digest = hashlib.sha256(kept)
        found = f"has {len(kept)} bytes, but the checkpoint was taken when it had {keep}" if len(kept) < keep else None
        if found is None and sha256 not in (None, self.sha256):
            found = "is not what it was when the checkpoint was taken (another SHA-256)"
        if found:
            raise CheckpointError(f"{path} {found}: restore the file, or delete the run directory to start again.")
        self.file = open(path, "ab")  # noqa: SIM115 - open for the whole run
        self.file.truncate(keep)

    @property
    def sha256(self) -> str:
        """Of all lines so far."""
        return self._digest.hexdigest()

    def write(self, record: dict[str, Any]) -> None:
        """Append one line."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        line = (json.dumps(finite, allow_nan=False) + "\n").encode()
        self._digest.update(line)
        self.file.write(line)
        self.file.flush()

    def sync(self) -> int:
        """Make all lines durable; return the size, which a checkpoint stores."""
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def books(state: dict[str, Any] | None) -> tuple[float, int, str | None]:
    """What a checkpoint says of the run's log."""
    if state is None:
        return 0.0, 0, None
    seconds, size, digest = (state.get(key) for key in ("seconds", "metrics_bytes", "metrics_sha256"))
    if isinstance(seconds, float) and isinstance(size, int) and size >= 0 and isinstance(digest, str | None):
        return seconds, size, digest
    raise CheckpointError(
        f"the checkpoint does not fit this run (seconds {seconds!r}, metrics_bytes {size!r}, metrics_sha256 "
        f"{digest!r}): it was written by another version of the trainer. Use another --output."
    )


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append a JSON line to a file that nothing depends on, after what a full disk may have left of the one before."""
    with open(path, "ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps(record) + "\n").encode())


class Progress:
    """A bar with the remaining time on a terminal, a plain line now and then elsewhere."""

    def __init__(self, kind: str, done: int, total: int, *, every: float = 30.0) -> None:
        if kind == "auto":
            kind = "bar" if sys.stderr.isatty() else "lines"
        self.kind, self.done, self.total, self.every = kind, done, total, every
        self.said, self.then = time.monotonic(), done  # when the last line was printed, and the steps done by then
        self.pace: tuple[float, float] | None = None  # steps and seconds between lines, the last ones most
        self.shown: dict[str, str] = {}
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if kind == "bar" else None

    def show(self, **numbers: float | None) -> None:
        """Replace the numbers shown."""
        self.shown.update({key: f"{value:.4g}" for key, value in numbers.items() if value is not None})
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)

    def advance(self) -> None:
        """Count one step."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif self.kind == "lines" and time.monotonic() - self.said > self.every:
            self.line()

    def line(self) -> None:
        """Print a plain line now, where lines are wanted."""
        if self.kind != "lines":
            return
        # Of late, not since the start: steps are longer once the term has joined.
        now = time.monotonic()
        steps, seconds = self.done - self.then, now - self.said
        before = self.pace or (steps, seconds)
        self.pace = 0.7 * before[0] + 0.3 * steps, 0.7 * before[1] + 0.3 * seconds
        self.said, self.then = now, self.done
        left = duration((self.total - self.done) * self.pace[1] / self.pace[0]) if self.pace[0] else "?"
        numbers = "  ".join(f"{key} {value}" for key, value in self.shown.items())
        print(f"step {self.done}/{self.total}  {numbers}  {left} left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a sentence without breaking the bar."""
        if self.kind != "none":
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """Write seconds for people: `45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines with columns of one width, and a rule below the first."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def shown(value: Any) -> str:
    """An option's value for people."""
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def environment(device: torch.device) -> dict[str, Any]:
    """What bitwise equality depends on, beside the options."""
    return {"torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads()}


def software() -> dict[str, str | None]:
    """Which code started a run; `revision` is None where it does not lie in a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        revision = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = None
    return {"gradconsist": gradconsist.__version__, "python": platform.python_version(), "revision": revision}
