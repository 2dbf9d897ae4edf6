"""Measures seconds and peak memory of one call."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gradconsist.errors import DeviceError


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Measures the wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        _counters(device).synchronize(device)
    return time.perf_counter() - start


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Measures the peak of the bytes that torch holds during the call, above what it held before.

    On a CPU, it sums up the allocations and releases that torch's profiler records: all tensors, and what operators of
    torch allocate inside. It does not see memory that libraries such as oneDNN and MKL keep, nor what the C library
    does not return to the system. On CUDA and XPU, it is the allocator's own peak, which is reset before.
    """
    gc.collect()
    if device.type != "cpu":
        counters = _counters(device)
        counters.synchronize(device)
        counters.reset_peak_memory_stats(device)
        before: int = counters.memory_allocated(device)
        call()
        counters.synchronize(device)
        return counters.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:  # only the trace file shows single events through a public API
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak


def _counters(device: torch.device) -> Any:
    """Returns the module of the device (torch.cuda, torch.xpu) with its clock and its memory's counters."""
    module = getattr(torch, device.type, None)
    needed = ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated")
    if not all(hasattr(module, name) for name in needed):
        raise DeviceError(f"{device} does not count its peak memory: measure on CUDA or on the CPU.")
    return module
