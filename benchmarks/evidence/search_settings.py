"""Is there a setting in which the term helps? A search on small images that cannot fool itself.

    python benchmarks/evidence/search_settings.py --preset claim --output benchmarks/results/digits_claim.json
    python benchmarks/evidence/search_settings.py --preset search --output benchmarks/results/digits_search.json
    python benchmarks/evidence/search_settings.py --preset search --photographs cifar10-jpeg --steps 300
        --output benchmarks/results/photographs_search.json

`search` trains every setting in SETTINGS, and its base (the same training without the term), with ten seeds, and looks
at held-out images only. It ranks the settings by the lower end of the 95 % interval of their paired difference to
their base. The best three are trained again with 50 fresh seeds and evaluated on the test images, beside their base
and FixMatch for as many steps, and their base for as much time. `claim` does the second part alone, for the term at
weight 0.1, beside the labels alone. No other run ever sees the test images.

Runs of one seed share labeled images, initial weights, batches and views, so differences are taken seed by seed; their
intervals are Student's. Times are processor times of the training steps, without the preparation of the views. "As much
time": the ratio of two times is the median over the first five fresh seeds, and the base gets so many times the steps,
with a schedule to match.

Every finished run is written at once. A second call goes on with the missing ones; a file from other options or from
another version of this program is refused. With --pause-file, no run starts while that file exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks/shared", "examples")]
import short_runs
import small_images
from environment import write_result
from short_runs import CLAIM, SETTINGS, Setting, accuracy, train
from small_images import Images, digits, photographs

import gradconsist
from trainer.statistics import paired_difference, spread

PROGRAM = __file__, short_runs.__file__, small_images.__file__
TIMED = 5  # fresh seeds whose times say how much longer the base trains
Runs = dict[str, dict[str, dict[str, list[float]]]]  # stage, name, seed: accuracy, seconds, steps


class Job(NamedTuple):
    """A run that is missing."""

    folder: Path | None  # of the photographs
    name: str
    setting: Setting
    seed: int
    steps: int
    part: str
    pause: Path | None


def run(job: Job) -> tuple[str, int, list[float]]:
    """Trains: name, seed, and accuracy, seconds and steps."""
    while job.pause is not None and job.pause.exists():
        time.sleep(5)
    images = images_of(job.folder)
    model, seconds = train(images, job.setting, job.seed, job.steps)
    return job.name, job.seed, [accuracy(images, model, job.part), seconds, job.steps]


@cache
def images_of(folder: Path | None) -> Images:
    """Photographs of a folder, or digits: read once, and inherited by forked processes."""
    return digits() if folder is None else photographs(folder)


class Record:
    """The finished runs in a file, and what they say.

    Args:
        path: The result file, new or from an earlier call.
        folder: Of the photographs; None for digits.
        identity: What every run depends on; a file with another one is refused.
        processes: How many runs at a time.
        pause: While this file exists, no run starts.
    """

    def __init__(
        self, path: Path, folder: Path | None, identity: dict[str, Any], processes: int, pause: Path | None
    ) -> None:
        self.path, self.folder, self.identity = path, folder, identity
        self.processes, self.pause = processes, pause
        self.runs: Runs = {}
        self.settings: dict[str, Setting] = {}
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            theirs = dict(found["identity"])
            self.runs = found["runs"]
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f"--output {path} is no result file of this program ({error!r}): give another file.")
        if theirs != identity:
            names = sorted(name for name in theirs.keys() | identity if theirs.get(name) != identity.get(name))
            sys.exit(f"--output {path} was made with another {', '.join(names)}: give another file, or what it had.")

    def train(self, stage: str, rows: Mapping[str, tuple[Setting, int]], seeds: Sequence[int], part: str) -> None:
        """Train each row of a stage with each seed, but for what is finished, and evaluate on a part of the data."""
        self.settings |= {name: setting for name, (setting, _) in rows.items()}
        done = {name: self.runs.setdefault(stage, {}).setdefault(name, {}) for name in rows}
        missing = [(name, seed) for seed in seeds for name in rows if str(seed) not in done[name]]
        jobs = [Job(self.folder, name, rows[name][0], seed, rows[name][1], part, self.pause) for name, seed in missing]
        with multiprocessing.get_context("fork").Pool(self.processes) if self.processes > 1 else nullcontext() as pool:
            for name, seed, found in pool.imap_unordered(run, jobs) if pool else map(run, jobs):
                done[name][str(seed)] = found
                self.write()

    def ratio(self, stage: str, name: str, base: str, seeds: Sequence[int]) -> float:
        """By how much a row's runs take longer than its base's."""
        mine, other = (self.runs[stage][each] for each in (name, base))
        return statistics.median(mine[str(seed)][1] / other[str(seed)][1] for seed in seeds)

    def percent(self, stage: str, name: str) -> dict[int, float]:
        """Accuracy by seed."""
        return {int(seed): 100 * run[0] for seed, run in self.runs[stage].get(name, {}).items()}

    def summary(self) -> list[dict[str, Any]]:
        """Each row of each stage: mean accuracy in per cent, and paired differences in points."""
        found = []
        for stage, rows in self.runs.items():
            for name, runs in rows.items():
                setting = self.settings.get(name)
                if setting is None or not runs:
                    continue
                mine = self.percent(stage, name)
                row = {"stage": stage, "name": name, "term": setting.weight != 0, "base": setting.base.title}
                row |= dataclasses.asdict(spread(list(mine.values()))) | {"steps": int(next(iter(runs.values()))[2])}
                row["seconds"] = statistics.median(run[1] for run in runs.values())
                fixmatch = Setting(labels=setting.labels).title
                longer = f"{setting.base.title}, as long as {name}"
                for key, other in {"base": row["base"], "fixmatch": fixmatch, "equal_time": longer}.items():
                    gap = paired_difference(mine, self.percent(stage, other)) if other != name else None
                    row[f"minus_{key}"] = None if gap is None else dataclasses.asdict(gap)
                found.append(row)
        return found

    def write(self) -> None:
        """Write everything, whole or not at all."""
        settings = {name: dataclasses.asdict(setting) for name, setting in self.settings.items()}
        summary = self.summary()
        tried = sum(row["stage"] == "search" and row["term"] for row in summary)
        result = {"identity": self.identity, "tried": tried, "summary": summary, "settings": settings}
        write_result(self.path, result | {"runs": self.runs})


def with_bases(settings: Mapping[str, Setting], steps: int) -> dict[str, tuple[Setting, int]]:
    """Rows of settings, before them each one's base, and FixMatch and the labels alone with as many labels."""
    plain: list[Setting] = []
    for labels in sorted({setting.labels for setting in settings.values()}):
        plain += [Setting("supervised", labels), Setting("fixmatch", labels)]
    plain += [setting.base for setting in settings.values()]
    return {setting.title: (setting, steps) for setting in plain} | {
        name: (setting, steps) for name, setting in settings.items()
    }


def search(record: Record, settings: Mapping[str, Setting], seeds: int, steps: int) -> dict[str, Setting]:
    """All settings on held-out images; the three best, by the lower end of the interval of what they gain."""
    record.train("search", with_bases(settings, steps), range(seeds), "held out")
    gains = {
        row["name"]: row["minus_base"]["low"] for row in record.summary() if row["stage"] == "search" and row["term"]
    }
    best = sorted(gains, key=lambda name: -gains[name])[:3]
    return {name: settings[name] for name in best}


def confirm(record: Record, settings: Mapping[str, Setting], seeds: range, steps: int) -> None:
    """Settings on test images, with fresh seeds, beside what has no term, for as many steps and as much time."""
    rows = with_bases(settings, steps)
    timed = seeds[:TIMED]
    record.train("confirm", rows, timed, "test")
    for name, setting in settings.items():
        ratio = record.ratio("confirm", name, setting.base.title, timed)
        rows[f"{setting.base.title}, as long as {name}"] = setting.base, round(ratio * steps)
    record.train("confirm", rows, seeds, "test")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--preset", choices=("claim", "search"), required=True, help="what to train, as above")
    made.add_argument("--output", type=Path, required=True, help="the result file; an unfinished one is continued")
    made.add_argument("--steps", type=int, default=200, help="of a run (default: %(default)s)")
    made.add_argument("--seeds", type=int, default=10, help="of the search (default: %(default)s)")
    made.add_argument("--fresh", type=int, default=50, help="seeds for the test images (default: %(default)s)")
    made.add_argument("--only", nargs="+", choices=list(SETTINGS), metavar="NAME", help="of the search's settings")
    made.add_argument(
        "--photographs",
        type=Path,
        metavar="FOLDER",
        help="CIFAR-10's images as train/CLASS/*.jpg and"
        " test/CLASS/*.jpg, of which two classes take the place of the digits",
    )
    made.add_argument("--processes", type=int, default=1, help="runs at a time (default: %(default)s)")
    made.add_argument("--pause-file", type=Path, help="while it exists, no run starts")
    options = made.parse_args(arguments)
    for name, least in (("steps", 4), ("seeds", 2), ("fresh", 2), ("processes", 1)):
        if getattr(options, name) < least:
            made.error(f"--{name} must be at least {least}; found {getattr(options, name)}")
    if options.only and options.preset != "search":
        made.error("--only chooses among the settings of the search: leave it out, or give --preset search")
    torch.set_num_threads(1)  # such images are too small to share, and one thread repeats exactly
    try:
        images = images_of(options.photographs)
    except OSError as error:
        made.error(f"--photographs: {error}")
    settings = CLAIM if options.preset == "claim" else {name: SETTINGS[name] for name in options.only or SETTINGS}
    identity = {
        "program": hashlib.sha256(b"".join(Path(file).read_bytes() for file in PROGRAM)).hexdigest(),
        "images": images.digest,
        "torch": torch.__version__,
        "gradconsist": gradconsist.__version__,
        "names": list(settings),
        **{name: getattr(options, name) for name in ("preset", "steps", "seeds", "fresh")},
    }
    record = Record(options.output, options.photographs, identity, options.processes, options.pause_file)
    if options.preset == "search":
        settings = search(record, settings, options.seeds, options.steps)
    first = {"search": 1000, "claim": 2000}[options.preset]
    confirm(record, settings, range(first, first + options.fresh), options.steps)
    for row in record.summary():
        gap = row["minus_base"]
        shown = "" if gap is None else f"{gap['mean']:+6.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}]"
        print(f"{row['stage']:<8} {row['mean']:6.2f} {row['n']:4d} {row['seconds']:6.2f} s  {shown:<24} {row['name']}")


if __name__ == "__main__":
    main()
