"""Several processes that talk by gloo over the loopback device, and never hang.

    with Processes(2) as ranks:
        results = ranks.run(function, *arguments)      # [function(rank, world, *arguments) for rank ...], side by side

`function` must be importable.  The processes live from call to call, because starting one costs seconds.  A rank that
raises, dies or is silent for `timeout` seconds ends all of them, and `RankError` names it; the next call starts anew.

    process = started(run_program, "examples/fixmatch_cifar.py", ["--steps", "40"])     # a program, as if from a shell
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed

#: What takes seconds to import. DDP imports the second; the others are imported where this process has them.
HEAVY = ("torch", "torch._dynamo", "torchvision", "sklearn.datasets", "matplotlib.pyplot")


class RankError(Exception):
    """A rank failed; the message names it and holds its traceback."""


def forking() -> Any:
    """Processes forked from one that has imported torch and done nothing with it: quick, and no thread is lost."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in HEAVY if name in (*HEAVY[:2], *sys.modules)])
    return context


def started(function: Callable[..., None], *arguments: Any) -> Any:
    """A process that calls an importable function."""
    process = forking().Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def under_torchrun(world: int, restarts: int, function: Callable[..., None], *arguments: Any) -> int:
    """Exit status of torchrun's agent, whose ranks call `function(*arguments)` and are forked instead of started."""
    process = forking().Process(target=_launch, args=(world, restarts, function, arguments))
    process.start()
    process.join(280)
    process.kill()
    process.join()
    return int(process.exitcode)


def _launch(world: int, restarts: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    config = LaunchConfig(
        1, 1, world, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts,
        monitor_interval=0.1, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, function)(*arguments)


def run_program(script: str, arguments: list[str]) -> None:
    """What the process of a program does."""
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _serve(rank: int, world: int, store: str, timeout: float, connection: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # nothing beyond this machine can reach it
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    connection.send_bytes(pickle.dumps(("ready", None)))
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:  # the other end is gone
            return
        try:
            reply = ("done", function(rank, world, *arguments))
        except BaseException:
            reply = ("failed", traceback.format_exc())
        connection.send_bytes(pickle.dumps(reply))


class Processes:
    """`world` ranks of one gloo group; see the module."""

    def __init__(self, world: int, timeout: float = 60.0) -> None:
        self.world, self.timeout = world, timeout
        self.ranks: list[Any] = []
        self.connections: list[Connection] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """One result a rank; raises `RankError` if one fails or says nothing in time."""
        if not self.ranks:
            self._start()
        request = pickle.dumps((function, arguments))
        for connection in self.connections:
            connection.send_bytes(request)
        return self._collect("done")

    def _start(self) -> None:
        context = forking()
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank in range(self.world):
                near, far = context.Pipe()
                arguments = (rank, self.world, store, self.timeout, far)
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                far.close()
                self.ranks.append(process)
                self.connections.append(near)
            self._collect("ready")

    def _collect(self, expected: str) -> list[Any]:
        found: dict[int, Any] = {}
        deadline = time.monotonic() + self.timeout
        while len(found) < self.world:
            waiting = {self.connections[rank]: rank for rank in range(self.world) if rank not in found}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self.end()
                raise RankError(f"no answer within {self.timeout:g} s from rank {sorted(waiting.values())}")
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    kind, found[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    kind, found[rank] = "failed", "it ended without a word"
                if kind != expected:
                    self.end()
                    raise RankError(f"rank {rank} of {self.world} failed:\n{found[rank]}")
        return [found[rank] for rank in range(self.world)]

    def end(self) -> None:
        """Ends every rank."""
        for connection in self.connections:
            connection.close()
        for process in self.ranks:
            process.kill()
            process.join()
        self.ranks, self.connections = [], []
