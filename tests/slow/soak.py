"""Soak: thousands of steps of a small model, and whether anything is left behind. Linux with glibc.

    python tests/slow/soak.py                               # 20,000 steps for each variant, the better part of an hour
    python tests/slow/soak.py --quick                       # 1,000 steps: shows that it runs
    python tests/slow/soak.py --only ghost loop --output benchmarks/results/soak.json    # joins what is there

Every variant runs in a process of its own. A step is GGCRWrapper, backward and SGD, on batches some of whose pairs
have weight 0; each 100th (of 20,000) also measures, and fails once on NaN in the input and once in the middle of
the model.
At a twentieth of the steps and at the end are counted, after a collection, and must be equal:

    tensors      live torch.Tensor objects
    hooks        on the model's modules, on its parameters, and those of torch for all modules
    modes        torch's stacks of function and dispatch modes
    objects      what the garbage collector tracks, by type: no type may have grown

Over the last three quarters, a straight line is fitted to each of these (least squares over means of 15 blocks, 95 %
interval by Student's t for 13 degrees of freedom, so that neighbours' correlation within a block does not narrow it):

    rss          resident bytes, freed pages handed back first (malloc_trim): slope's upper end <= 50 bytes a step
    malloc       bytes that malloc has handed out (mallinfo2), without the allocator's noise: likewise
    blocks       Python's small objects (sys.getallocatedblocks): upper end <= 0.5 a step

Negative controls leak on purpose, and must be caught by what is named: a tensor kept each step, a hook registered each
step, a graph that grows behind one tensor (as ``total += loss`` does), a garbage-free native leak.
The exit status is 1 if a variant leaks or a control is not caught.
"""

from __future__ import annotations

import argparse
import array
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/shared"))
from environment import write_result

from gradconsist import GGCRWrapper, GradientConsistencyLoss, StepOutput, ViewPair
from gradconsist.errors import NonFiniteError

VARIANTS: dict[str, dict[str, Any]] = {
    "ghost": {"engine": "ghost"},
    "loop": {"engine": "loop"},
    "vmap": {"engine": "vmap"},
    "ghost, unfused": {"engine": "ghost", "fused": False},
    "ghost, chunk 1": {"engine": "ghost", "chunk_size": 1},
    "ghost, bf16 autocast": {"engine": "ghost"},
    "ghost, max_pairs and dropout": {"engine": "ghost", "max_pairs": 1, "dropout": "on"},
}
CONTROLS = {
    "tensor": ("tensors", "rss", "malloc"),
    "hook": ("hooks",),
    "graph": ("malloc",),
    "native": ("rss", "malloc"),
}
LIMITS = {"rss": 50.0, "malloc": 50.0, "blocks": 0.5}
BLOCKS = 15


class StopHereError(Exception):
    """Raised in the middle of a forward, as a user's own error would be."""


class Small(nn.Module):
    """A convolution, a BatchNorm and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(1, 2, 3, bias=False), nn.BatchNorm1d(2)
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(4, 3)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 3] of x [B, 1, 4]; an error in the middle while `fails`."""
        x = torch.tanh(self.norm(self.stem(x)))
        if self.fails:
            raise StopHereError
        return self.head(self.dropout(x.flatten(1)))


class Soak:
    """One variant: the model, its data, and a step."""

    def __init__(self, variant: str, leak: str | None, aside: int) -> None:
        torch.manual_seed(0)
        self.model = Small()
        self.loss = GradientConsistencyLoss(self.model, **VARIANTS[variant])
        self.wrapper = GGCRWrapper(self.method, self.loss, weight=0.1, warmup_steps=0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        weights = [(1.0, 1.0)] * 5 + [(1.0, 0.0), (0.5, 2.0), (0.0, 0.0)]
        self.batches = [(torch.randn(2, 1, 4), torch.randn(2, 1, 4), torch.tensor(weight)) for weight in weights]
        self.target = torch.tensor([0, 2])
        self.autocast = "autocast" in variant
        self.leak, self.every = leak, aside
        self.kept: Any = []
        self.caught = 0

    def method(self, weak: Tensor, strong: Tensor, weight: Tensor) -> StepOutput:
        """A supervised loss on the strong view; the pairs with the given weights."""
        loss = F.cross_entropy(self.model(strong), self.target)
        return StepOutput(loss, ViewPair(weak, strong, self.target, weight))

    def step(self, number: int) -> None:
        """One training step, and now and then what else a long run meets."""
        batch = self.batches[number % len(self.batches)]
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.wrapper(*batch).loss
        loss.backward()
        self.optimizer.step()
        if number % self.every == 0:
            self.aside()
        self.keep(loss)

    def aside(self) -> None:
        """What a long run meets now and then: monitoring, and errors that it survives."""
        weak, strong, weight = self.batches[0]
        self.loss.measure(weak, strong, self.target, weight)
        with suppress(NonFiniteError):
            self.loss(weak, torch.full_like(strong, torch.nan), self.target, weight)
            self.caught -= 1
        self.model.fails = True
        with suppress(StopHereError):
            self.loss(weak, strong, self.target, weight)
            self.caught -= 1
        self.model.fails = False
        self.caught += 2

    def keep(self, loss: Tensor) -> None:
        """The deliberate leaks."""
        if self.leak == "tensor":
            self.kept.append(torch.zeros(16))
        elif self.leak == "hook":
            self.model.head.register_forward_hook(_nothing)
        elif self.leak == "graph":
            small = self.model.head.bias.sum()
            self.kept = small if not isinstance(self.kept, Tensor) else self.kept + small
        elif self.leak == "native":
            LIBC.malloc(256)

    def counts(self) -> dict[str, Any]:
        """What must be equal at two steps."""
        gc.collect()
        kinds = Counter(type(entry) for entry in gc.get_objects())
        hooks = sum(
            len(value) for module in self.model.modules() for value in vars(module).values() if _is_hooks(value)
        )
        hooks += sum(len(parameter._backward_hooks or ()) for parameter in self.model.parameters())
        hooks += sum(
            len(value)
            for name, value in vars(nn.modules.module).items()
            if "_hooks" in name and isinstance(value, dict)
        )
        return {
            "tensors": sum(count for kind, count in kinds.items() if issubclass(kind, Tensor)),
            "hooks": hooks,
            "modes": torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack(),
            "objects": {f"{kind.__module__}.{kind.__qualname__}": count for kind, count in kinds.items()},
        }


def _nothing(*_: Any) -> None:
    """A hook without effect."""


def _is_hooks(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(key, int) for key in value)


class _MallInfo(ctypes.Structure):
    _before = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")
    _fields_ = [(name, ctypes.c_size_t) for name in (*_before, "uordblks", "fordblks", "keepcost")]


LIBC = ctypes.CDLL(None)
LIBC.mallinfo2.restype = _MallInfo
LIBC.malloc.restype, LIBC.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]


def memory() -> dict[str, float]:
    """The three measures, after a collection and with freed pages handed back."""
    gc.collect()
    LIBC.malloc_trim(0)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    info = LIBC.mallinfo2()
    return {"rss": resident, "malloc": info.uordblks + info.hblkhd, "blocks": sys.getallocatedblocks()}


def line(steps: list[int], values: list[float]) -> dict[str, float]:
    """Slope a step with its 95 % interval, over block means."""
    size = len(steps) // BLOCKS
    cuts = [slice(len(steps) - (i + 1) * size, len(steps) - i * size) for i in reversed(range(BLOCKS))]
    x = [sum(steps[cut]) / size for cut in cuts]
    y = [sum(values[cut]) / size for cut in cuts]
    mean_x, mean_y = sum(x) / BLOCKS, sum(y) / BLOCKS
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    half = 2.1604 * math.sqrt(rest / (BLOCKS - 2) / spread)  # t(0.975) for 13 degrees of freedom
    return {"slope": slope, "low": slope - half, "high": slope + half}


def soak(variant: str, steps: int, leak: str | None = None) -> dict[str, Any]:
    """Runs one variant in this process.

    Args:
        variant: a key of `VARIANTS`.
        steps: how many.
        leak: a key of `CONTROLS`, or None.

    Returns:
        Slopes, growth between the two counts, and the names of what tells of a leak.
    """
    Soak(variant, None, aside=1).step(0)  # torch imports as it goes; then all that stays is put aside, since it would
    gc.collect()  # cost each collection a tenth of a second
    gc.freeze()
    run = Soak(variant, leak, aside=max(5, steps // 200))
    every = max(1, steps // (10 * BLOCKS))
    first, settled = max(steps // 20, 24), steps // 4  # by then the loss has repeated its checks
    points = [step for step in range(settled + 1, steps + 1) if step % every == 0]
    series = {name: array.array("d", bytes(8 * len(points))) for name in LIMITS}  # nothing grows while it runs
    early: dict[str, Any] = {}
    started, cursor = time.process_time(), 0
    for step in range(1, steps + 1):
        run.step(step)
        if step in (first - 1, first):  # once before it counts, so that what the measurement itself leaves is there
            memory()
            early = run.counts()
        if cursor < len(points) and step == points[cursor]:
            for name, value in memory().items():
                series[name][cursor] = value
            cursor += 1
    seconds = time.process_time() - started
    late = run.counts()
    lines = {name: line(points, list(values)) for name, values in series.items()}
    grown = {kind: count - early["objects"].get(kind, 0) for kind, count in late["objects"].items()}
    grown = {kind: count for kind, count in sorted(grown.items()) if count > 0}
    leaks = [name for name, limit in LIMITS.items() if lines[name]["high"] > limit]
    leaks += [name for name in ("tensors", "hooks", "modes") if early[name] != late[name]]
    leaks += ["objects"] if grown else []
    counted = {name: [early[name], late[name]] for name in ("tensors", "hooks", "modes")}
    total = [sum(early["objects"].values()), sum(late["objects"].values())]
    return {
        "variant": variant,
        "control": leak,
        "steps": steps,
        "milliseconds_a_step": 1e3 * seconds / steps,
        "errors_survived": run.caught,
        "lines": lines,
        "counts": counted | {"objects": total},
        "grown_types": grown,
        "leaks": leaks,
    }


def apart(variant: str, steps: int, leak: str | None) -> dict[str, Any]:
    """`soak` in a process of its own, on one thread."""
    request = json.dumps([{"variant": variant, "steps": steps, "leak": leak}])
    command = [sys.executable, str(Path(__file__).resolve()), "--one", request]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    result: list[dict[str, Any]] = json.loads(done.stdout)
    return result[0]


def verdict(row: dict[str, Any]) -> str:
    """Empty if the row is as it should be, else what is wrong."""
    if row["control"] is None:
        return f"leaks: {', '.join(row['leaks'])}" if row["leaks"] else ""
    missed = [name for name in CONTROLS[row["control"]] if name not in row["leaks"]]
    return f"not caught by: {', '.join(missed)}" if missed else ""


def show(row: dict[str, Any]) -> None:
    lines = row["lines"]
    rss = "{slope:+.1f} [{low:+.1f}, {high:+.1f}]".format(**lines["rss"])
    name = row["variant"] if row["control"] is None else f"control: {row['control']}"
    print(
        f"{name:30} {row['steps']:6} steps  rss {rss:26} B/step  malloc {lines['malloc']['slope']:+8.2f} B/step"
        f"  tensors {row['counts']['tensors']}  hooks {row['counts']['hooks']}  {verdict(row) or 'as it should be'}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 steps")
    parser.add_argument("--steps", type=int, help="steps of each variant (default: 20,000)")
    parser.add_argument("--control-steps", type=int, help="steps of each negative control (default: 1,000)")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, *CONTROLS], default=[*CONTROLS, *VARIANTS])
    parser.add_argument("--output", type=Path, help="write rows and environment as JSON; joins the rows of that file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        json.dump([soak(**request) for request in json.loads(options.one)], sys.stdout)
        return 0
    steps = options.steps or (1000 if options.quick else 20_000)
    control_steps = options.control_steps or 1000
    rows: dict[str, dict[str, Any]] = {}
    if options.output and options.output.exists():
        known: list[dict[str, Any]] = json.loads(options.output.read_text())["rows"]
        rows = {row["control"] or row["variant"]: row for row in known}
    wrong = 0
    for name in options.only:
        control: Callable[[str], bool] = CONTROLS.__contains__
        row = apart("ghost", control_steps, name) if control(name) else apart(name, steps, None)
        show(row)
        wrong += bool(verdict(row))
        rows[name] = row
        if options.output:
            write_result(options.output, {"limits": LIMITS, "rows": list(rows.values())})
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
