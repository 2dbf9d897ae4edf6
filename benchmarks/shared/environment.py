"""What every result file says about where it was made."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import gradconsist


def environment() -> dict[str, Any]:
    """Device, versions and the command, so that a figure can be repeated."""
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradconsist": gradconsist.__version__,
        "revision": revision.stdout.strip(),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes `result` beside its environment as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"environment": environment(), **result}, indent=2) + "\n")
    partial.replace(path)
