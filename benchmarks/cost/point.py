"""One measurement in a process of its own: seconds and peak memory of one variant of the training step.

    python benchmarks/cost/point.py '{"model": "wrn-28-2", "variant": "default", "labeled": 8, "pairs": 56}'

prints one line of JSON. `measure` starts it; memory.py and scaling.py are made of such points. The peak is the highest
resident memory while the steps run, minus the resident memory before the first one (the kernel's own high-water mark,
reset before; where the system has none, `ru_maxrss`); on CUDA it is torch's `max_memory_allocated`. Model and batch
exist before, so that they are in no figure.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/shared"))
from harness import Row, reason, timed
from models import spec
from steps import Step, applies, make_batch, reference_for

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class Peak:
    """The highest memory since the last `start`, above what there was at that moment, in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = 0

    def start(self) -> None:
        """Forgets earlier peaks."""
        gc.collect()
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        try:
            _RESET.write_text("5")  # the high-water mark becomes what is resident now
            self.before = _status("VmRSS")
        except OSError:
            self.before = _max_resident()

    def read(self) -> int:
        """Bytes."""
        if self.device != "cpu":
            return torch.cuda.max_memory_allocated() - self.before
        try:
            return _status("VmHWM") - self.before
        except OSError:
            return _max_resident() - self.before


def _status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}")


def _max_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(point: dict[str, Any]) -> Row:
    """Seconds, peak and errors of one point; a reason where the step fails."""
    if point.get("threads"):
        torch.set_num_threads(point["threads"])
    device, clock = point.get("device", "cpu"), point.get("clock", "wall")
    torch.manual_seed(0)
    model = spec(point["model"]).build().to(device)
    if not applies(point["variant"], model):
        return {"reason": "needs a BatchNorm"}
    batch = make_batch(point["model"], point["labeled"], point["pairs"], point.get("image_size"), device)
    result: Row = {"parameters": sum(p.numel() for p in model.parameters())}
    try:
        step = Step(point["variant"], model, batch)
        peak = Peak(device)
        peak.start()
        seconds = [timed(step, clock, device) for _ in range(point.get("steps", 2))]
        result |= {"peak_bytes": peak.read(), "first_call_seconds": seconds[0]}
        result["seconds_median"] = statistics.median(seconds[1:] or seconds)
        model.zero_grad()
        if point.get("oracle_pairs") and step.term is not None:
            result |= step.errors(reference_for(model, batch, min(point["oracle_pairs"], point["pairs"])))
    except (RuntimeError, NotImplementedError, ValueError, MemoryError) as error:
        return result | {"reason": reason(error)}
    return result | {"reason": None}


def measure(point: dict[str, Any], *, timeout: float, limit_bytes: int | None = None) -> Row:
    """Runs one point in a fresh process.

    Args:
        point: as on the command line.
        timeout: seconds after which it is stopped and becomes a row with that reason.
        limit_bytes: address space that the process may take on a CPU, so that a point that needs too much fails alone.

    Returns:
        The point, with what was measured or the reason why not.
    """
    command = [sys.executable, __file__, json.dumps(point | {"limit_bytes": limit_bytes})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {**point, "reason": f"stopped after {timeout:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {**point, "reason": reason(RuntimeError(f"exit status {done.returncode}: {last}"))}
    return {**point, **json.loads(done.stdout.splitlines()[-1])}


def memory_limit() -> int:
    """Nine tenths of this machine's memory."""
    return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    point = json.loads(sys.argv[1])
    limit = point.pop("limit_bytes", None)
    if limit and point.get("device", "cpu") == "cpu":
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(run(point)))


if __name__ == "__main__":
    main()
