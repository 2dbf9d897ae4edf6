"""Running a grid: one process per cell, so that a cell that crashes ends alone; times, and stops that lose nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainer.files import json_lines, read_json, readable
from trainer.grid import BUDGETS, Cell, Grid
from trainer.launch import Signals
from trainer.runlog import append_line, duration

TRAINER = Path(__file__).parents[1] / "fixmatch_cifar.py"
# How long a cell may take to write its checkpoint after a first Ctrl-C.
PATIENCE = 120.0
SAY_EVERY = 30.0


class Times:
    """Wall-clock seconds per step of each kind of cell, from the grid's own journal."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.path = grid, grid.folder / "journal.jsonl"
        with readable(self.path, "remove it; times alone are lost"):
            self.entries = json_lines(self.path) if self.path.exists() else []
            sum(entry["seconds"] + entry["steps"] for entry in self.entries)

    def add(self, cell: Cell, seconds: float, steps: int, status: int) -> None:
        """Note one call of the trainer."""
        entry = {
            "cell": cell.folder.name, "column": cell.column, "variant": cell.variant, "term": cell.has_term,
            "seconds": round(seconds, 2), "steps": steps, "status": status,
        }  # fmt: skip
        self.entries.append(entry)
        append_line(self.path, entry)

    def left(self, cell: Cell) -> float:
        """Seconds that a cell still needs: by cells of its variant, else with or without the term as it is.

        Else it is the budget's first guess, times what other cells took over theirs.
        """
        if cell.is_finished():
            return 0.0
        steps = cell.config.steps - cell.steps_done()
        for alike in (("column", "variant"), ("column", "term")):
            own = {"column": cell.column, "variant": cell.variant, "term": cell.has_term}
            known = [entry for entry in self.entries if entry["steps"] and all(entry[k] == own[k] for k in alike)]
            if known:
                return steps * _rate(known)
        guess = BUDGETS[self.grid.budget].seconds_per_step
        known = [entry for entry in self.entries if entry["steps"]]
        guessed = sum(entry["steps"] * guess[entry["term"]] for entry in known)
        slower = sum(entry["seconds"] for entry in known) / guessed if known else 1.0
        return steps * guess[cell.has_term] * slower

    @property
    def measured(self) -> bool:
        """Whether any cell has run here."""
        return any(entry["steps"] > 0 for entry in self.entries)


def _rate(entries: list[dict[str, Any]]) -> float:
    """Seconds per step."""
    return sum(entry["seconds"] for entry in entries) / sum(entry["steps"] for entry in entries)


def listing(grid: Grid) -> str:
    """The cells, their states and what they will take, one a line."""
    times = Times(grid)
    lines = []
    for cell in grid.cells:
        done = cell.steps_done()
        state = "finished" if cell.is_finished() else f"at step {done}" if done else "to do"
        left = "" if cell.is_finished() else f"about {long_duration(times.left(cell))}"
        lines.append(f"{cell.folder.name:<44} {done:>8}/{cell.config.steps}  {state:<16} {left}".rstrip())
    source = "by the cells that ran here" if times.measured else "a first guess, for one core of an x86-64 CPU"
    total = sum(times.left(cell) for cell in grid.cells)
    finished = sum(cell.is_finished() for cell in grid.cells)
    lines.append(
        f"{len(grid.cells)} cells, {finished} finished; about {long_duration(total)} left ({source}), one after another"
    )
    return "\n".join(lines)


def long_duration(seconds: float) -> str:
    """As `runlog.duration`, and `12 days` where hours say nothing."""
    return duration(seconds) if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"


def run_grid(grid: Grid, minutes: float | None) -> tuple[str | None, list[Cell]]:
    """Run what is not finished, in order; stop after some minutes, with a checkpoint of the running cell."""
    times = Times(grid)
    failed: list[Cell] = []
    (grid.folder / "logs").mkdir(parents=True, exist_ok=True)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with Signals() as stop:
        for number, cell in enumerate(grid.cells, 1):
            if cell.is_finished():
                continue
            if deadline is not None and time.monotonic() >= deadline:
                return f"--stop-after-minutes {minutes:g}", failed
            left = sum(times.left(other) for other in grid.cells[number - 1 :])
            say(f"[{number}/{len(grid.cells)}] {cell.folder.name}: about {long_duration(times.left(cell))}; "
                f"the grid about {long_duration(left)}")  # fmt: skip
            before, started = cell.steps_done(), time.monotonic()
            status = _run_cell(grid, cell, deadline, stop)
            seconds = time.monotonic() - started
            times.add(cell, seconds, max(0, cell.steps_done() - before), status)
            if stop.received:
                return signal.Signals(stop.received[0]).name, failed
            if cell.is_finished():
                say(f"  test accuracy {read_json(cell.folder / 'summary.json')['last']:.4f} after {duration(seconds)}")
            elif status != 0:
                failed.append(cell)
                say(f"  failed with status {status}; the grid goes on. The end of {_log(grid, cell)}:")
                say("\n".join("    " + line for line in _log(grid, cell).read_text().splitlines()[-8:]))
    if failed or all(cell.is_finished() for cell in grid.cells):
        return None, failed
    return ("the trainer's own budget" if minutes is None else f"--stop-after-minutes {minutes:g}"), failed


def say(text: str) -> None:
    """Print progress beside the tables, which go to standard output."""
    print(text, file=sys.stderr, flush=True)


def _log(grid: Grid, cell: Cell) -> Path:
    return grid.folder / "logs" / f"{cell.folder.name}.log"


def _run_cell(grid: Grid, cell: Cell, deadline: float | None, stop: Signals) -> int:
    command = [sys.executable, str(TRAINER), *cell.arguments]
    if deadline is not None:
        command += ["--stop-after-minutes", f"{max(0.001, (deadline - time.monotonic()) / 60):.4f}"]
    environment = dict(os.environ)
    if BUDGETS[grid.budget].one_thread:
        environment.setdefault("OMP_NUM_THREADS", "1")
    with open(_log(grid, cell), "a", encoding="utf-8") as log:
        # In its own session: a Ctrl-C of the terminal reaches the grid alone, which passes on exactly one.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            return _wait(process, cell, stop)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], cell: Cell, stop: Signals) -> int:
    started = said = time.monotonic()
    first, asked = cell.steps_done(), None
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if stop.received and asked is None:
            asked = now
            process.send_signal(signal.SIGINT)
            say("  stopping: the running cell writes a checkpoint; once more to kill it")
        elif asked is not None and (len(stop.received) > 1 or now - asked > PATIENCE):
            process.kill()
        if now - said > SAY_EVERY:
            said, done = now, cell.steps_done()
            rate = (done - first) / (now - started)
            left = f", about {long_duration((cell.config.steps - done) / rate)} left" if rate else ""
            say(f"  step {done}/{cell.config.steps}{left}")
