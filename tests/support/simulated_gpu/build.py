"""Builds the simulated CUDA runtime on first use, and says what a process needs to run on it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
SOURCE = Path(__file__).with_name("runtime.c")


def compiler() -> str | None:
    """The C compiler: $CC, or the first of the usual names."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def missing() -> str | None:
    """The reason why there can be no simulated GPU here, or None."""
    if not sys.platform.startswith("linux"):
        return f"the simulated GPU is preloaded, which needs Linux, not {sys.platform}"
    if (torch.version.cuda or "").split(".")[0] != "13":
        return (
            f"the simulated GPU needs a build of torch for CUDA 13; this one is for {torch.version.cuda or 'the CPU'}"
        )
    return None if compiler() else "the simulated GPU is built on first use, and there is no C compiler"


def library() -> Path:
    """The shared library, built unless one of the same source lies there; ready to be loaded by several processes."""
    key = hashlib.sha256(SOURCE.read_bytes() + sysconfig.get_platform().encode()).hexdigest()[:16]
    path = ROOT / "build" / "simulated_gpu" / f"{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        # The name makes it torch's driver library too.
        flags = ["-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([str(compiler()), *flags, str(SOURCE), "-o", str(fresh)], check=True)
        fresh.replace(path)
    return path


def environment() -> dict[str, str]:
    """What to add to a process's environment so that torch finds the device."""
    paths = [str(ROOT / part) for part in ("src", "examples", "tests")] + [os.environ.get("PYTHONPATH", "")]
    # Without the variable a program would wait for a device that it believes in.
    return {"LD_PRELOAD": str(library()), "SIMULATED_GPU": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
