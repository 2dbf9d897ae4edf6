"""The processes of a run under torchrun: who does what, and that all of them agree.

A process alone has the same interface: every function is then the identity, and no process group exists.

torchrun's variables say who a process is. What travels between processes is tensors and JSON, never a pickle.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradconsist.errors import GradConsistError
from trainer.errors import OptionError, OtherProcessError, TrainerError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int  # 0 to world - 1.
    world: int  # W, the number of processes.
    local_world: int  # Processes on this machine.
    device: torch.device  # Where this process computes.

    @property
    def first(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This process's rows of a global batch: equal contiguous parts in the order of the ranks."""
        part = rows // self.world
        return slice(self.rank * part, (self.rank + 1) * part)

    def wrap(self, step: nn.Module) -> nn.Module:
        """DDP around the whole step; with one process, the step itself."""
        if self.world == 1:
            return step
        return DistributedDataParallel(step, device_ids=[self.device] if self.device.type == "cuda" else None)

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sums over all processes, in float64."""
        total = torch.tensor(list(values), dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return [float(value) for value in total]

    def agree(self, reason: str | None, exit_code: int) -> tuple[str | None, int]:
        """Stop together: a signal or a clock may reach one process only."""
        code = self.maximum(-1 if reason is None else exit_code)
        return (None, 0) if code < 0 else (reason or "another process", code)

    def maximum(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.world == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def mean(self, numbers: dict[str, float]) -> dict[str, float]:
        """Means over the processes that have a number (is not NaN); the names are the same everywhere."""
        if self.world == 1:
            return numbers
        known = [0.0 if math.isnan(value) else value for value in numbers.values()]
        sums = self.sum(known + [float(not math.isnan(value)) for value in numbers.values()])
        counts = sums[len(known) :]
        return {
            name: value / count if count else math.nan
            for name, value, count in zip(numbers, sums, counts, strict=False)
        }

    def gather(self, row: Tensor) -> Tensor:
        """The CPU tensors of all processes, `[W, ...]`."""
        rows = [torch.empty_like(row) for _ in range(self.world)]
        if self.world == 1:
            return row[None]
        dist.all_gather(rows, row)
        return torch.stack(rows)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of process 0."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def bytes_from_first(self, content: bytes) -> bytes:
        """Process 0's bytes."""
        if self.world == 1:
            return content
        size = torch.tensor(len(content))
        dist.broadcast(size, 0)
        if not int(size):  # which frombuffer refuses
            return b""
        data = torch.empty(int(size), dtype=torch.uint8)
        if self.first:
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def on_first(self, action: Callable[[], T]) -> T:
        """Let process 0 do something that the others wait for."""
        if self.world == 1:
            return action()
        answer: dict[str, object] = {}
        try:
            if self.first:
                answer = {"result": action()}
        except BaseException as error:
            answer = {"exit_code": getattr(error, "exit_code", 1)}
            raise
        finally:
            answer = json.loads(self.bytes_from_first(json.dumps(answer).encode()))
        if "result" not in answer:
            failure = OtherProcessError("process 0 failed")
            failure.exit_code = int(str(answer["exit_code"]))
            raise failure
        return answer["result"]  # type: ignore[return-value]

    def together(self, action: Callable[[], T]) -> T:
        """Do something on every process, and go on only if all could; one that communicates fails only after that."""
        error: Exception | None = None
        try:
            result = action()
        except (TrainerError, GradConsistError, OSError) as caught:
            error = caught
        # The lowest rank that failed is the largest of W - rank.
        failed = self.maximum(0 if error is None else self.world - self.rank)
        if failed and failed != self.world - self.rank:
            failure = OtherProcessError(f"process {self.world - failed} failed")
            failure.exit_code = getattr(error, "exit_code", 1)
            raise failure
        if error is not None:
            raise error
        return result


# A process that has no others, on the CPU.
ALONE = Processes(0, 1, 1, torch.device("cpu"))


def join(device: str) -> Processes:
    """Find out who this process is, and meet the others."""
    world = dist.get_world_size() if dist.is_initialized() else _variable("WORLD_SIZE", 1, 1)
    if world == 1:
        return Processes(0, 1, 1, usable_device(device))
    local_world = _variable("LOCAL_WORLD_SIZE", 1, world)
    if dist.is_initialized():  # by the caller
        rank = dist.get_rank()
        return Processes(rank, world, local_world, usable_device(device, rank % local_world))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise OptionError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set: start the processes with torchrun."
        )
    rank, local_rank = _variable("RANK", 0, 0, world), _variable("LOCAL_RANK", 0, 0, world)
    _variable("MASTER_PORT", 0, 0, 2**16)
    chosen = usable_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # gloo in any case: flags, states and JSON are on the CPU.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if local_world == world and "TORCHELASTIC_RESTART_COUNT" in os.environ:
        # torchrun keeps one store over its restarts, where gloo would find the addresses of the killed processes. On
        # several machines the counts may differ, and this must be the same for all (docs/guides/distributed.md).
        store, rank, world = next(iter(dist.rendezvous("env://")))  # type: ignore[attr-defined]
        store = dist.PrefixStore(  # type: ignore[attr-defined]
            f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store
        )
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    else:
        dist.init_process_group(backend)
    return Processes(rank, world, local_world, chosen)


def leave() -> None:
    """End the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_of_processes(error: BaseException) -> bool:
    """Whether an error is about another process that is gone."""
    return isinstance(error, RuntimeError) and bool(re.search(r"gloo|NCCL|[Cc]onnection|timed out", str(error)))


def _variable(name: str, least: int, default: int, below: int = 2**31) -> int:
    """A whole number that torchrun sets."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not least <= int(text) < below:
        raise OptionError(
            f"{name} in the environment is {text!r}: expected a whole number from {least} to {below - 1}. Start the "
            "processes with torchrun, or unset it."
        )
    return int(text)


def usable_device(name: str, local_rank: int | None = None) -> torch.device:
    """`--device` for this process: each process of a machine has a CUDA device of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and local_rank is not None:
            if ":" in name:
                raise OptionError(f"--device {name}: each process takes the device of its own rank; write cuda.")
            device = torch.device("cuda", local_rank)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name!r} is not usable here ({str(error).splitlines()[0]}): try cpu.") from error
    return device
