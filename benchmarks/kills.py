"""SIGKILL at moments nobody chose: is the resumed run, bit for bit, the uninterrupted one? Linux.

    python benchmarks/kills.py                      # all parts; continues where it was stopped
                                                    # several may run at a time, each adding its runs
    python benchmarks/kills.py --only random save   # some parts
    python benchmarks/kills.py --quick              # a few kills of each part, nothing written

The program killed is examples/fixmatch_cifar.py itself, on the embedded digits; a run may be killed several times,
and each kill is resumed by the same command. At the end the run is compared with an uninterrupted one by SHA-256 of
each item of its last two checkpoints (parameters, average, optimizer, scaler, random states, meter, ...), of
metrics.jsonl, split.json and summary.json. Parts:

    random      forks of one process that has imported torch; moments uniform in the time of a whole run
    save        the same, aimed: while a save is seen in the folder, whose fsync and rename take 30 ms more here
    operations  the process kills itself just before its n-th change of a file or fsync, for every n of a whole run
    cold        python examples/fixmatch_cifar.py from its start, imports included
    torchrun    examples/fixmatch_imagenet.py in two gloo processes: one of them is killed, at random; torchrun ends,
                or starts both anew
    control     one item of the state is forgotten on resuming, each in turn: the comparison must notice

The exit status is 1 if a run differs, a resume fails or a forgotten item is not noticed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import write_result
from victims import ROOT, SCRIPT, Victim, before_operations, digests, forked, launched, remains

from recipes.trainer import Trainer

RESULT = ROOT / "benchmarks" / "results" / "kills.json"
Start = Callable[[Path], Victim]

COMMON = (
    "--preset demo --labels 20 --batch-size 4 --unlabeled-ratio 2 --steps 16 --unlabeled-ramp 6 --ggcr-warmup 2"
    " --ggcr-max-pairs 2 --ggcr-every 2 --eval-every 8 --checkpoint-every 5 --log-every 4 --progress lines"
)
SHORT = "supervised, 5 steps"
# Saves at 5, 10, 15 and 16: at 15 the meter is not empty. MixMatch draws from torch's global generator.
VARIANTS = {
    SHORT: "--method supervised --steps 5 --checkpoint-every 2 --eval-every 5 --log-every 2 --workers 0",
    "fixmatch": "--threshold 0.12 --workers 0",
    "fixmatch, fp16, a worker": "--threshold 0.12 --amp fp16 --workers 1",
    "flexmatch, SAM": "--method flexmatch --threshold 0.12 --optimizer sam --workers 0",
    "mixmatch, fp16": "--method mixmatch --amp fp16 --workers 0",
}
WANTED = {"random": 100, "save": 20, "cold": 6, "torchrun": 20}
QUICK = {"random": 4, "save": 2, "cold": 1, "torchrun": 1}
STEP_OF_CONTROL = 9


class Bench:
    """The reference runs, the results so far, and a place to run in.

    Args:
        options: The command line.
        work: A folder for the runs.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.numbers = options, work, random.SystemRandom()
        self.wanted = QUICK if options.quick else WANTED
        self.result: dict[str, Any] = {"tree": tree(), "runs": [], "control": []}
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


def tree() -> str:
    """SHA-256 of the library and the trainers: results of other sources are not continued."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def totals(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By part: kills, runs, runs that are equal, kills inside a save."""
    rows = []
    for part in dict.fromkeys(run["part"] for run in runs):
        mine = [run for run in runs if run["part"] == part]
        kills = [kill for run in mine for kill in run["kills"]]
        rows.append(
            {
                "part": part,
                "kills": len(kills),
                "inside a save": sum(bool(kill["inside"]) for kill in kills),
                "before the first checkpoint": sum(kill["step"] is None for kill in kills),
                "runs": len(mine),
                "equal": sum(not run["differing"] for run in mine),
            }
        )
    return rows


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


def at_random(bench: Bench, part: str, variant: str, start: Start) -> None:
    """Kill a run again and again at moments uniform in the time of a whole run, until it ends before its kill."""
    whole, seconds = bench.reference(f"{part} {variant}", start)
    folder, kills = bench.folder(), []
    while True:
        victim, delay = start(folder), bench.numbers.uniform(0, seconds)
        if victim.wait(delay):
            break
        victim.kill()
        kills.append({"after": round(delay, 3), **remains(folder)})
    finish(victim, folder)
    if kills:
        bench.keep(part, variant, folder, kills, whole)


def slow_disk(_: Path) -> None:
    """30 ms more for each fsync and each rename, so that most of a save's time is where a kill hurts."""
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        setattr(os, name, lambda *given, original=original: (time.sleep(0.03), original(*given))[1])


def in_a_save(bench: Bench, variant: str) -> None:
    """Kill a run once in each of its saves, at a random moment after the temporary file is seen."""
    whole, _ = bench.reference(f"random {variant}", in_fork(variant))
    start = in_fork(variant, slow_disk)
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


def forgetting(item: str) -> Callable[[Path], object]:
    """A preparation of the fork: the trainer resumes all of its state but one item, which stays as at the start."""

    def prepare(folder: Path) -> None:
        load = Trainer.load_state_dict

        def without(self: Trainer, state: dict[str, Any]) -> None:
            part, _, inner = item.partition(" ")
            now = 0 if item == "step" else None
            if part == "metrics_bytes":  # nothing is cut off
                state[part] = (folder / "metrics.jsonl").stat().st_size
            elif part != "nothing":
                now = now if now is not None else self.state_dict()[part]
                state[part] = {**state[part], inner: now[inner]} if inner else now
            load(self, state)

        Trainer.load_state_dict = without  # type: ignore[method-assign]

    return prepare


def dies_at_step(_: Path) -> None:
    """A preparation of the fork: SIGKILL before a step between two checkpoints."""
    step = Trainer.train_step

    def dying(self: Trainer, images: Any) -> None:
        if self.step == STEP_OF_CONTROL:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, images)

    Trainer.train_step = dying  # type: ignore[method-assign]


def control(bench: Bench) -> None:
    """Resume a killed run without one item of its state, each item in turn."""
    if bench.result["control"]:
        return
    variant = "mixmatch, fp16"
    whole, _ = bench.reference(f"random {variant}", in_fork(variant))
    killed = bench.folder()
    in_fork(variant, dies_at_step)(killed).wait(600)
    state = torch.load(killed / "checkpoints" / "step-00000005.pt", weights_only=True)
    items = [key for key in state if key not in ("options", "seconds", "cuda_rng", "method")]
    items += [f"method {key}" for key in state["method"] if not key.startswith("method.model.encoder.")]
    items += ["method method.model.encoder.stem.weight", "average updates", "optimizer state", "scaler scale"]
    found = []
    for item in ["nothing", *(items[:2] if bench.options.quick else items)]:
        folder = bench.folder()
        shutil.copytree(killed, folder)
        victim = in_fork(variant, forgetting(item))(folder)
        victim.wait(600)
        how = "refused" if victim.status else ""
        if victim.status == 0:
            now = digests(folder)
            how = ", ".join(sorted({key.split(" ")[-1] for key in now | whole if now.get(key) != whole.get(key)}))
        found.append({"item": item, "noticed": bool(how), "by": how})
        print(f"control    without {item:<40} {how or 'NOT NOTICED'}", flush=True)
        shutil.rmtree(folder.parent)
    bench.join("control", found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("random", "save", "operations", "cold", "torchrun", "control")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--quick", action="store_true", help="a few kills of each part; nothing is written")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of programs that start afresh: bitwise means with the same number of threads
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(options, Path(work))
        variants = [name for name in VARIANTS if name != SHORT][: 1 if options.quick else None]
        weights = [4 if name == "fixmatch" else 1 for name in variants]
        if "control" in options.only:
            control(bench)
        if "save" in options.only:
            while bench.kills("save") < bench.wanted["save"]:
                in_a_save(bench, bench.numbers.choices(variants, weights)[0])
        if "random" in options.only:
            while bench.kills("random") < bench.wanted["random"]:
                variant = bench.numbers.choices(variants, weights)[0]
                at_random(bench, "random", variant, in_fork(variant))
        if "operations" in options.only:
            operations(bench)
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
