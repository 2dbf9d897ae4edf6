"""Runs the benchmarks of cost/ and of flatness, one after the other, and draws the plots.

    python benchmarks/all.py                 # hours on two cores; results into benchmarks/results
    python benchmarks/all.py --quick         # under ten minutes; results into build/benchmarks

Each program writes a JSON file of its name, with its setting and environment; each can be run by itself, with more
options. A quick run shows that everything runs; its figures are not for quoting, so it goes elsewhere. Other libraries
that are not installed (cost/peers.py names them) are rows with that reason.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "step_cost": "cost/step_cost.py",
    "memory": "cost/memory.py",
    "measure_peers": "cost/measure_peers.py",
    "kernels": "cost/kernels.py",
    "scaling": "cost/scaling.py",
    "profile": "cost/profile_step.py",
    "frontier": "cost/frontier.py",
    "flatness": "evidence/flatness.py",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--results", type=Path, help="folder for the JSON files, from the repository's root")
    parser.add_argument("--plots", type=Path, help="folder for the PNG files, likewise")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    # Relative to the repository, where everything runs: results record their command.
    quick = Path("build") / "benchmarks"
    results = options.results or (quick if options.quick else Path("benchmarks") / "results")
    plots = options.plots or (quick if options.quick else Path("docs") / "assets")
    common = ["--clock", options.clock, "--device", options.device]
    common += ["--quick"] if options.quick else []
    common += ["--threads", str(options.threads)] if options.threads else []
    failed = []
    for name in options.only:
        print(f"\n=== {name}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, f"benchmarks/{PROGRAMS[name]}", *common, "--output", str(results / f"{name}.json")]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
        print(f"=== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    draw = [sys.executable, "docs/generators/plots.py", "--results", str(results), "--output", str(plots)]
    if subprocess.run(draw, cwd=ROOT, check=False).returncode:
        failed.append("plots")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
