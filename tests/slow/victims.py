"""Runs of a trainer as processes that can be killed, and the SHA-256 of everything that they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "fixmatch_cifar.py"
IMAGENET = ROOT / "examples" / "fixmatch_imagenet.py"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "src")]

import matplotlib.pyplot  # noqa: F401  # all of this once, here, and not in every fork
import sklearn.datasets  # noqa: F401
import torch
import torchvision  # noqa: F401

import trainer.training  # noqa: F401


class Victim:
    """A process that trains.

    Args:
        pid: Its id.
        poll: Returns its exit status, or None while it runs.
    """

    def __init__(self, pid: int, poll: Callable[[], int | None]) -> None:
        self.pid, self._poll, self.status = pid, poll, poll()

    def ended(self) -> bool:
        """Whether it is over; its status is then in `status` (negative: the signal)."""
        if self.status is None:
            self.status = self._poll()
        return self.status is not None

    def wait(self, seconds: float, patience: float = 0.002) -> bool:
        """Wait so long at most; return whether it ended."""
        deadline = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(patience)
        return self.ended()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait(60)


class Pair(Victim):
    """Two processes of one run; a kill takes one of them, and the other ends by itself.

    Before they have met, the other one waits for the killed one, as torch lets it for half an hour: then the kill takes
    both, as a launcher would.

    Args:
        members: The two.
        numbers: Decides which.
        log: Where they say that they have met.
        said: Bytes of it that are from earlier starts.
    """

    def __init__(self, members: Sequence[Victim], numbers: random.Random, log: Path, said: int) -> None:
        self.members, self.numbers, self.log, self.said = members, numbers, log, said
        super().__init__(members[0].pid, self._both)

    def _both(self) -> int | None:
        ended = [member.ended() for member in self.members]
        if not all(ended):
            return None
        return next((member.status for member in self.members if member.status), 0)

    def kill(self) -> None:
        """SIGKILL to one, and wait for both.

        Raises:
            RuntimeError: Where the other one goes on.
        """
        met = b"run directory" in self.log.read_bytes()[self.said :]
        for member in [self.numbers.choice(self.members)] if met else self.members:
            member.kill()
        if not self.wait(180, 0.02):
            for member in self.members:
                if not member.ended():
                    member.kill()
            raise RuntimeError("a process outlived the other one by three minutes")


class Launched(Victim):
    """torchrun; a kill takes one of its workers."""

    def kill(self) -> None:
        """SIGKILL to a worker, or to torchrun before it has any; it then ends all of them, or starts them anew."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        if children:
            os.kill(int(random.choice(children)), signal.SIGKILL)
        else:
            super().kill()


def forked(
    arguments: Sequence[str], log: Path, *, prepare: Callable[[], object] = lambda: None, script: Path = SCRIPT
) -> Victim:
    """A trainer with these arguments in a fork, which spares it the seconds of importing torch.

    Args:
        arguments: Its command line.
        log: Where its output goes.
        prepare: Called in the fork before the program starts.
        script: The trainer.

    Returns:
        The process.
    """
    pid = os.fork()
    if pid:
        return Victim(pid, lambda: _status(pid))
    code = 70
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = [str(script), *arguments]
        prepare()
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _status(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def two_processes(arguments: Sequence[str], log: Path, script: Path, numbers: random.Random) -> Pair:
    """Two forks that meet as those of torchrun do, by its variables, with gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def as_rank(rank: str) -> Callable[[], None]:
        return lambda: os.environ.update(world | {"RANK": rank, "LOCAL_RANK": rank, "GLOO_SOCKET_IFNAME": "lo"})

    said = log.stat().st_size if log.exists() else 0  # before the forks, which write to it
    members = [forked(arguments, log, prepare=as_rank(rank), script=script) for rank in "01"]
    return Pair(members, numbers, log, said)


def launched(command: Sequence[str], log: Path, kind: type[Victim] = Victim) -> Victim:
    """A program from its very start, as a user starts it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "GLOO_SOCKET_IFNAME": "lo"}
    with open(log, "ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    return kind(process.pid, process.poll)


def before_operations(folder: Path, act: Callable[[int], object]) -> None:
    """From now on, call `act(n)` before the n-th change of a file, or fsync, of this process below `folder`."""
    count, inside, sync = 0, str(folder), os.fsync

    def operation() -> None:
        nonlocal count
        count += 1
        act(count - 1)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate")
        writes = writes or (event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and isinstance(given[0], str | os.PathLike) and inside in os.fspath(given[0]):
            operation()

    os.fsync = lambda *given: (operation(), sync(*given))[1]
    sys.addaudithook(hook)


def slow_disk(seconds: float) -> None:
    """From now on, each fsync and each rename of this process takes so much longer."""
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        setattr(os, name, lambda *given, original=original: (time.sleep(seconds), original(*given))[1])


def remains(folder: Path) -> dict[str, Any]:
    """What a killed process left: the step of the last checkpoint, and what is half done.

    Args:
        folder: The run directory.

    Returns:
        `step` (None before the first checkpoint), `lines` of metrics.jsonl, and `inside`: what says that the kill
        fell into a save (a temporary file, a checkpoint without its record, one more than is kept).
    """
    checkpoints = folder / "checkpoints"
    names = {path.name for path in checkpoints.glob("*")} if checkpoints.exists() else set()
    recorded = sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))
    inside = [name for name in sorted(names) if name.endswith(".tmp")]
    inside += [f"{name} alone" for name in sorted(names) if name.endswith(".pt") and name[:-3] not in recorded]
    inside += ["one too many"] if len(recorded) > 2 else []
    metrics = folder / "metrics.jsonl"
    return {
        "step": int(recorded[-1].removeprefix("step-")) if recorded else None,
        "lines": metrics.read_bytes().count(b"\n") if metrics.exists() else 0,
        "inside": inside,
    }


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each part of what a finished run holds, wall clock left out.

    Args:
        folder: The run directory.

    Returns:
        By part: both checkpoints' items (parameters, average, optimizer, scaler, random states, meter, ...),
        metrics.jsonl, split.json and summary.json.
    """
    found = {name: _sha(folder / name) for name in ("metrics.jsonl", "split.json")}
    summary = json.loads((folder / "summary.json").read_text())
    found["summary.json"] = canonical({key: value for key, value in summary.items() if key != "seconds"})
    for record in sorted((folder / "checkpoints").glob("step-*.json")):
        path = record.with_suffix(".pt")
        if json.loads(record.read_text())["sha256"] != _sha(path):
            found[f"{record.stem} record"] = "does not vouch for its file"
        state = torch.load(path, map_location="cpu", weights_only=True)
        for part, value in state.items():
            if part == "options":  # the run directories differ by name, and a call may have been told to stop
                value = {key: option for key, option in value.items() if key not in ("output", "stop_after_steps")}
            if part != "seconds":
                found[f"{record.stem} {part}"] = canonical(value)
    return found


def canonical(value: Any) -> str:
    """SHA-256 of nested dicts and lists of tensors and plain values, bit for bit."""
    digest = hashlib.sha256()

    def take(item: Any) -> None:
        if isinstance(item, dict):
            digest.update(f"dict {len(item)}".encode())
            for key, inner in item.items():
                digest.update(repr(key).encode())
                take(inner)
        elif isinstance(item, list | tuple):
            digest.update(f"list {len(item)}".encode())
            for inner in item:
                take(inner)
        elif isinstance(item, torch.Tensor):
            digest.update(f"{item.dtype} {tuple(item.shape)}".encode())
            digest.update(item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{type(item).__name__} {item!r}".encode())

    take(value)
    return digest.hexdigest()


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree_digest() -> str:
    """SHA-256 of the library and the trainers: results of other sources are not continued."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def totals(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By part: kills, runs, runs that are equal, kills inside a save."""
    rows = []
    for part in dict.fromkeys(run["part"] for run in runs):
        mine = [run for run in runs if run["part"] == part]
        kills = [kill for run in mine for kill in run["kills"]]
        rows.append(
            {
                "part": part,
                "kills": len(kills),
                "inside a save": sum(bool(kill["inside"]) for kill in kills),
                "before the first checkpoint": sum(kill["step"] is None for kill in kills),
                "runs": len(mine),
                "equal": sum(not run["differing"] for run in mine),
            }
        )
    return rows
