"""SIGKILL at moments nobody chose: is the resumed run, bit for bit, the uninterrupted one? Linux.

    python tests/slow/kills.py                      # all parts; continues where it was stopped
                                                    # several may run at a time, each adding its runs
    python tests/slow/kills.py --only random save   # some parts
    python tests/slow/kills.py --quick              # a few kills of each part, nothing written

The program killed is examples/fixmatch_cifar.py itself, on the embedded digits; a run may be killed several times,
and each kill is resumed by the same command. At the end the run is compared with an uninterrupted one by SHA-256 of
each item of its last two checkpoints (parameters, average, optimizer, scaler, random states, meter, ...), of
metrics.jsonl, split.json and summary.json. Parts:

    random      forks of one process that has imported torch; moments uniform in the time of a whole run
    save        the same, aimed: while a save is seen in the folder, whose fsync and rename take 30 ms more here
    operations  the process kills itself just before its n-th change of a file or fsync, for every n of a whole run
    cold        python examples/fixmatch_cifar.py from its start, imports included
    processes   examples/fixmatch_imagenet.py in two forks that meet by gloo: one of them is killed, the other must end
                by itself, and both are started again
    torchrun    the same program by torchrun --max-restarts 3, which starts both anew when one was killed
    control     one item of the state is forgotten on resuming, each in turn: the comparison must notice

The exit status is 1 if a run differs, a resume fails or a forgotten item is not noticed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "tests")]
from environment import write_result
from kills_control import control, draws
from victims import (
    IMAGENET,
    ROOT,
    SCRIPT,
    Launched,
    Victim,
    before_operations,
    digests,
    forked,
    launched,
    remains,
    slow_disk,
    totals,
    tree_digest,
    two_processes,
)

from support.pictures import draw_folder

RESULT = ROOT / "benchmarks" / "results" / "kills.json"
Start = Callable[[Path], Victim]

COMMON = (
    "--preset demo --labels 20 --batch-size 4 --unlabeled-ratio 2 --steps 16 --unlabeled-ramp 6 --ggcr-warmup 2"
    " --ggcr-max-pairs 2 --ggcr-every 2 --eval-every 8 --checkpoint-every 5 --log-every 4 --progress lines"
)
SHORT = "supervised, 5 steps"
CONTROL = "mixmatch, fp16, no overflow"
# Saves at 5, 10, 15 and 16: at 15 the meter is not empty.
VARIANTS = {
    SHORT: "--method supervised --steps 5 --checkpoint-every 2 --eval-every 5 --log-every 2 --workers 0",
    "fixmatch": "--threshold 0.12 --workers 0",
    "fixmatch, fp16, a worker": "--threshold 0.12 --amp fp16 --workers 1",
    "flexmatch, SAM": "--method flexmatch --threshold 0.12 --optimizer sam --workers 0",
    "mixmatch, fp16": "--method mixmatch --amp fp16 --workers 0",
    # An overflow after the kill would make the forgotten loss scale what it should be.
    CONTROL: "--method mixmatch --amp fp16 --unlabeled-weight 1 --eval-every 4 --workers 0",
}
WANTED = {"random": 100, "save": 20, "cold": 6, "processes": 20, "torchrun": 20}
QUICK = {"random": 4, "save": 2, "cold": 1, "processes": 1, "torchrun": 1}
PHOTOGRAPHS = (
    "--arch shufflenet_v2_x0_5 --image-size 16 --label-fraction 0.34 --batch-size 4 --unlabeled-ratio 1 --threshold 0.2"
    " --unlabeled-ramp 0 --steps 10 --lr 0.01 --lr-warmup 1 --ggcr-warmup 2 --ggcr-max-pairs 2 --ema 0.9"
    " --eval-every 5 --checkpoint-every 3 --log-every 2 --workers 0 --progress lines --device cpu"
)


class Bench:
    """The reference runs, the results so far, and a place to run in.

    Args:
        options: The command line.
        work: A folder for the runs.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.numbers = options, work, random.SystemRandom()
        self.wanted = QUICK if options.quick else WANTED
        self.result: dict[str, Any] = {"tree": tree_digest(), "runs": [], "control": []}
        self.join("runs", [])
        self.references: dict[str, tuple[dict[str, str], float]] = {}

    def reference(self, name: str, start: Start) -> tuple[dict[str, str], float]:
        """Digests and seconds of an uninterrupted run."""
        if name not in self.references:
            folder, begun = self.folder(), time.monotonic()
            finish(start(folder), folder)
            self.references[name] = digests(folder), time.monotonic() - begun
        return self.references[name]

    def folder(self) -> Path:
        """A fresh run directory's name."""
        return Path(tempfile.mkdtemp(dir=self.work)) / "run"

    def kills(self, part: str) -> int:
        """Kills so far that count for a part."""
        runs = [run for run in self.result["runs"] if run["part"] == part]
        return sum(bool(kill["inside"]) if part == "save" else 1 for run in runs for kill in run["kills"])

    def keep(self, part: str, variant: str, folder: Path, kills: list[dict[str, Any]], whole: dict[str, str]) -> None:
        """Compare a finished run with the uninterrupted one, and write it down."""
        now = digests(folder)
        differing = sorted(key for key in now.keys() | whole.keys() if now.get(key) != whole.get(key))
        verdict = f"differs: {differing}" if differing else "equal"
        print(f"{part:<11}{variant:<26}{len(kills):>3} kills  {verdict}", flush=True)
        self.join("runs", [{"part": part, "variant": variant, "kills": kills, "differing": differing}])
        shutil.rmtree(folder.parent)

    def join(self, key: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to the results, and to what this and other processes have written of the same sources."""
        output = self.options.output
        if self.options.quick:
            self.result[key] += rows
            return
        with open(output.with_suffix(".lock"), "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            before = json.loads(output.read_text()) if output.exists() else {}
            if before.get("tree") == self.result["tree"]:
                self.result = {name: before[name] for name in self.result}
            self.result[key] += rows
            if rows:
                write_result(output, {**self.result, "parts": totals(self.result["runs"])})
        output.with_suffix(".lock").unlink(missing_ok=True)


def finish(victim: Victim, folder: Path) -> None:
    """Let a run end.

    Raises:
        RuntimeError: Where it fails.
    """
    if not victim.wait(600, 0.02) or victim.status != 0:
        log = (folder.parent / "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"a run ended with status {victim.status}:\n{log}")


def options_of(variant: str, folder: Path) -> list[str]:
    return [*f"{COMMON} {VARIANTS[variant]}".split(), "--output", str(folder)]


def in_fork(variant: str, prepare: Callable[[Path], object] = lambda _: None) -> Start:
    return lambda folder: forked(options_of(variant, folder), folder.parent / "log", prepare=lambda: prepare(folder))


def from_the_start(folder: Path) -> Victim:
    return launched([sys.executable, str(SCRIPT), *options_of("fixmatch", folder)], folder.parent / "log")


def photographs(work: Path) -> list[str]:
    """Options of the ImageNet trainer, with 36 + 15 random JPEGs of three classes to train on."""
    parts = {part: dict.fromkeys(("ant", "bee", "cat"), count) for part, count in (("train", 12), ("val", 5))}
    folder = draw_folder(work / "photographs", parts, size=(24, 20), name="{label}_{number}.JPEG")
    return [*PHOTOGRAPHS.split(), "--data-dir", str(folder)]


def together(bench: Bench, part: str) -> None:
    """Kill one of two processes, as forks or under torchrun."""
    options = photographs(bench.work)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def start(folder: Path) -> Victim:
        arguments, log = [*options, "--output", str(folder)], folder.parent / "log"
        if part == "processes":
            return two_processes(arguments, log, IMAGENET, bench.numbers)
        return launched([*launcher, "--max-restarts", "3", str(IMAGENET), *arguments], log, Launched)

    while bench.kills(part) < bench.wanted[part]:
        at_random(bench, part, "two processes", start)


def at_random(bench: Bench, part: str, variant: str, start: Start) -> None:
    """Kill a run again and again at moments uniform in the time of a whole run, until it ends before its kill."""
    whole, seconds = bench.reference(f"{part} {variant}", start)
    folder, kills = bench.folder(), []
    while True:
        # After eight kills it may end: on a machine that got slower, no moment in `seconds` is late enough.
        victim, delay = start(folder), bench.numbers.uniform(0, seconds) if len(kills) < 8 else 600.0
        before = len(kills)
        while not victim.wait(delay):
            victim.kill()
            kills.append({"after": round(delay, 3), **remains(folder)})
            delay = bench.numbers.uniform(seconds / 2, seconds)  # torchrun goes on, with workers that must import first
        if victim.status == 0 or len(kills) == before:  # over, or failed unkilled, which `finish` tells
            break
    finish(victim, folder)
    if kills:
        bench.keep(part, variant, folder, kills, whole)


def in_a_save(bench: Bench, variant: str) -> None:
    """Kill a run once in each of its saves, at a random moment after the temporary file is seen."""
    whole, _ = bench.reference(f"random {variant}", in_fork(variant))
    # Most of a save's time is then where a kill hurts.
    start = in_fork(variant, lambda _: slow_disk(0.03))
    folder, kills = bench.folder(), []
    while True:
        victim, checkpoints = start(folder), folder / "checkpoints"
        before = {path.name for path in checkpoints.glob("*.pt.tmp")}  # of the process before
        skip = bench.numbers.randrange(2)
        seen: set[str] = set()
        while not victim.ended() and len(seen) <= skip:
            seen |= {path.name for path in checkpoints.glob("*.pt.tmp")} - before
            time.sleep(0.001)
        if victim.ended():
            break
        delay = bench.numbers.uniform(0, 0.25)
        if victim.wait(delay):
            break
        victim.kill()
        kills.append({"after": round(delay, 3), **remains(folder)})
        if len(kills) == 3:
            victim = start(folder)
            break
    finish(victim, folder)
    if kills:
        bench.keep("save", variant, folder, kills, whole)


def dies_before(number: int) -> Callable[[Path], object]:
    """A preparation of the fork: SIGKILL before the n-th file operation below the run directory.

    With a number below 0 the process only counts, into a file beside the run directory.
    """

    def prepare(folder: Path) -> None:
        counter = os.open(folder.parent / "count", os.O_WRONLY | os.O_CREAT)

        def act(count: int) -> None:
            if number < 0:
                os.write(counter, b".")
            elif count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        before_operations(folder, act)

    return prepare


def operations(bench: Bench) -> None:
    """Kill a run just before each of its file operations."""
    variant = SHORT
    whole, _ = bench.reference(f"random {variant}", in_fork(variant))
    folder = bench.folder()
    finish(in_fork(variant, dies_before(-1))(folder), folder)
    count = (folder.parent / "count").stat().st_size
    done = {run["kills"][0]["after"] for run in bench.result["runs"] if run["part"] == "operations"}
    for number in range(0, count, 16 if bench.options.quick else 1):
        if f"operation {number}" in done:
            continue
        folder = bench.folder()
        victim = in_fork(variant, dies_before(number))(folder)
        victim.wait(600)
        if victim.status != -signal.SIGKILL:
            raise RuntimeError(f"operation {number} of {count} did not come: status {victim.status}")
        left = {"after": f"operation {number}", **remains(folder)}
        finish(in_fork(variant)(folder), folder)
        bench.keep("operations", variant, folder, [left], whole)


def under_control(bench: Bench) -> list[dict[str, Any]]:
    """The rows of the control."""

    def start(folder: Path, prepare: Callable[[Path], object]) -> Victim:
        return in_fork(CONTROL, prepare)(folder)

    whole, _ = bench.reference("control", in_fork(CONTROL, draws))
    return control(bench.folder, start, whole, bench.options.quick)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("random", "save", "operations", "processes", "torchrun", "cold", "control")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--quick", action="store_true", help="a few kills of each part; nothing is written")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of programs that start afresh: bitwise means with the same number of threads
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(options, Path(work))
        variants = [name for name in VARIANTS if name not in (SHORT, CONTROL)][: 1 if options.quick else None]
        weights = [4 if name == "fixmatch" else 1 for name in variants]
        if "control" in options.only and not bench.result["control"]:
            bench.join("control", under_control(bench))
        if "save" in options.only:
            while bench.kills("save") < bench.wanted["save"]:
                in_a_save(bench, bench.numbers.choices(variants, weights)[0])
        if "random" in options.only:
            while bench.kills("random") < bench.wanted["random"]:
                variant = bench.numbers.choices(variants, weights)[0]
                at_random(bench, "random", variant, in_fork(variant))
        if "operations" in options.only:
            operations(bench)
        for part in {"processes", "torchrun"} & set(options.only):
            together(bench, part)
        if "cold" in options.only:
            while bench.kills("cold") < bench.wanted["cold"]:
                at_random(bench, "cold", "fixmatch", from_the_start)
    rows = totals(bench.result["runs"])
    print(json.dumps(rows, indent=2))
    missed = [row["item"] for row in bench.result["control"] if row["noticed"] == (row["item"] == "nothing")]
    print(f"control: {len(bench.result['control'])} items, wrong in {missed or 'none'}")
    return 1 if missed or any(row["runs"] != row["equal"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
