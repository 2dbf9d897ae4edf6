"""Seconds and peak memory of one call."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch holds at one moment of the call, above what it held before.

    On a CPU they are summed up from the allocations and releases that torch's profiler records: all tensors, and what
    operators of torch allocate inside. What a library below (oneDNN, MKL) keeps for itself, and what the C library does
    not give back to the system, is not in it. On CUDA it is the allocator's own peak, which is reset before.

    Args:
        call: what is measured.
        device: where it runs.

    Returns:
        Bytes.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:  # the trace is the profiler's only public form of single events
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak
