"""One step of FixMatch on the GPU, and its milliseconds."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "cost")]
from models import spec

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist.methods import FixMatch

Row = dict[str, Any]
DEVICE = torch.device("cuda", 0)
PRECISIONS = {"float32": (False, None), "tf32": (True, None), "bfloat16": (True, torch.bfloat16)}


def allow_tf32(allowed: bool) -> None:
    """For products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


class Step:
    """One step of FixMatch on random images, with or without the term."""

    def __init__(
        self, name: str, labeled: int, unlabeled: int, side: int | None, weight: float, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = spec(name).build().to(DEVICE).train()
        shape = spec(name).shape(side)
        weak = torch.randn(unlabeled, *shape, device=DEVICE)
        labels = torch.arange(labeled, device=DEVICE) % 10
        strong = weak + 0.3 * torch.randn_like(weak)
        self.batch = SSLBatch(torch.randn(labeled, *shape, device=DEVICE), labels, weak, strong)
        self.loss = GradientConsistencyLoss(self.model, encoder=lambda name: not name.startswith("head"), **options)
        self.method = FixMatch(self.model, threshold=0.0)
        self.wrapper = GGCRWrapper(self.method, self.loss, weight=weight, warmup_steps=0, gate="method")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self, dtype: torch.dtype | None = None, threshold: float = 0.0) -> None:
        """Runs the step; `threshold` decides how many pairs are compared."""
        self.method.threshold = threshold
        with torch.autocast("cuda", dtype=dtype) if dtype else nullcontext():
            loss = self.wrapper(self.batch).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def timed(step: Callable[[int], None], rounds: int) -> Row:
    """Milliseconds of a step by the wall clock, and how much of it the device works, by a trace of a few steps."""
    for number in range(min(3, rounds)):
        step(number)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(rounds):
        start = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for number in range(min(3, rounds)):
            step(number)
        torch.cuda.synchronize()
    wall = 1e6 * (time.perf_counter() - start)
    on_device = [event for event in trace.events() if event.device_type.name == "CUDA"]
    busy = sum(event.time_range.elapsed_us() for event in on_device)
    low, high = min(times), max(times)
    return {
        "ms": statistics.median(times), "ms_min": low, "ms_max": high, "peak_mib": peak / 2**20,
        "kernels": len(on_device) / min(3, rounds), "device_busy": busy / wall,
        "device_ms": busy / 1e3 / min(3, rounds),
    }  # fmt: skip
