"""Runs a program on the simulated device: `python -m support.simulated_gpu program.py ARGUMENTS`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .device import SimulatedGPU


def main() -> None:
    """Runs the named program as if it had been started itself."""
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    with SimulatedGPU():
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
