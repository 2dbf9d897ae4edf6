"""The control of `kills.py`: a trainer that forgets one item of its state on resuming must be noticed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from victims import Victim, digests

from trainer.step import Trainer

Prepare = Callable[[Path], object]
Start = Callable[[Path, Prepare], Victim]
STEP_OF_CONTROL = 9


def forgetting(item: str) -> Callable[[Path], object]:
    """A preparation of the fork: the trainer resumes all of its state but one item, which stays as at the start."""

    def prepare(folder: Path) -> None:
        draws(folder)
        load = Trainer.load_state_dict

        def without(self: Trainer, state: dict[str, Any]) -> None:
            whole = state
            fresh = {**self.state_dict(), "metrics_bytes": (folder / "metrics.jsonl").stat().st_size}
            path = item.split(" ")
            for part in path[:-1]:
                state, fresh = state[part], fresh[part]
            if item != "nothing":
                state[path[-1]] = fresh[path[-1]]
            load(self, whole)

        Trainer.load_state_dict = without  # type: ignore[method-assign]

    return prepare


def draws(_: Path) -> None:
    """A preparation of the fork: each step draws from torch's global generator, which none of the methods does."""
    step = Trainer.train_step

    def drawing(self: Trainer, images: Any) -> None:
        torch.rand(1)
        step(self, images)

    Trainer.train_step = drawing  # type: ignore[method-assign]


def dies_at_step(folder: Path) -> None:
    """A preparation of the fork: SIGKILL before a step between two checkpoints."""
    draws(folder)
    step = Trainer.train_step

    def dying(self: Trainer, images: Any) -> None:
        if self.step == STEP_OF_CONTROL:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, images)

    Trainer.train_step = dying  # type: ignore[method-assign]


def control(fresh: Callable[[], Path], start: Start, whole: dict[str, str], quick: bool) -> list[dict[str, Any]]:
    """Resume a killed run without one item of its state, each item in turn.

    Args:
        fresh: Names a new run directory.
        start: Starts the trainer on it, after a preparation.
        whole: Digests of the uninterrupted run.
        quick: Two items only.

    Returns:
        A row for each item: whether it was noticed, and by what.
    """
    killed = fresh()
    start(killed, dies_at_step).wait(600)
    state = torch.load(killed / "checkpoints" / "step-00000005.pt", weights_only=True)
    # What a resumed run does without: its options are those of the command, and clocks differ.
    items = [key for key in state if key not in ("options", "seconds", "cuda_rng", "metrics_sha256")]
    items += [f"average {key}" for key in state["average"]]
    # One parameter or statistic of each name, and each item of the term's state.
    items += [f"method {key}" for key in {key.split(".")[-1]: key for key in state["method"]}.values()]
    items += [f"method _extra_state {key}" for key in state["method"]["_extra_state"]]
    found = []
    for item in ["nothing", *(items[:2] if quick else items)]:
        folder = fresh()
        shutil.copytree(killed, folder)
        victim = start(folder, forgetting(item))
        victim.wait(600)
        how = "refused" if victim.status == 1 else ""
        if victim.status not in (0, 1):
            raise RuntimeError(f"without {item}: status {victim.status}\n{(folder.parent / 'log').read_text()[-2000:]}")
        if victim.status == 0:
            now = digests(folder)
            how = ", ".join(sorted({key.split(" ")[-1] for key in now | whole if now.get(key) != whole.get(key)}))
        found.append({"item": item, "noticed": bool(how), "by": how or "nothing"})
        print(f"control    without {item:<40} {how or 'NOT NOTICED'}", flush=True)
        shutil.rmtree(folder.parent)
    return found
