"""Run directories, finished or not, as records; and runs that differ in their seed alone as groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import HARMLESS
from trainer.errors import DatasetError
from trainer.evaluation import summarize
from trainer.files import finite, json_lines, read_json
from trainer.runlog import shown
from trainer.statistics import FINAL


@dataclass(frozen=True)
class Run:
    """What a run directory says about itself."""

    folder: Path  # The run directory.
    label: str  # What was trained, for legends.
    options: dict[str, Any]  # Its options.
    steps: list[int]  # Steps of each evaluation.
    accuracies: list[float]  # Test accuracy of each evaluation.
    summary: dict[str, Any] | None  # `summary.json`, or None while the run is unfinished.
    training: list[dict[str, Any]]  # The lines of metrics.jsonl that average training steps.
    timing: list[tuple[int, float]]  # Steps and the seconds of training behind them, rising.
    rate: float | None  # Images per second of training, where it is known.
    split: str | None  # SHA-256 of the labeled split, where it is known.
    data: str | None  # SHA-256 of the data set, where it is known.
    environment: dict[str, Any]  # Where it was started: device, versions, revision.

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.options["seed"])

    @property
    def source(self) -> str:
        """Name of its data set, or of their folder."""
        folder = Path(str(self.options.get("data_dir", "")))
        return folder.name if self.options.get("dataset") == "folder" else str(self.options.get("dataset"))

    @property
    def step(self) -> int:
        """The last step that it says anything about."""
        return max([0, *self.steps[-1:], *(record["step"] for record in self.training[-1:])])

    def accuracy(self) -> dict[str, float]:
        """`last`, `median_last_20` and `best`; of the evaluations so far, where it is unfinished."""
        if self.summary is not None:
            return {key: self.summary[key] for key in FINAL if self.summary[key] is not None}
        return summarize(self.accuracies) if self.accuracies else {}

    def curve(self, name: str) -> dict[int, float]:
        """Step to a number of its training log, where there is one."""
        return {record["step"]: record[name] for record in self.training if name in record}


def read_run(folder: Path) -> Run:
    """Read a run directory, finished or not; raises `DatasetError` where it is not one."""
    try:
        config = read_json(folder / "config.json")
        records = json_lines(folder / "metrics.jsonl")
        # Without a test part, what is known is of held-out images.
        accuracies = [
            (record["step"], record.get("test_accuracy", record.get("held_out_accuracy")))
            for record in records
            if record["kind"] == "eval"
        ]
        evaluations = [(_step(step), finite(accuracy)) for step, accuracy in accuracies if accuracy is not None]
        training = [record for record in records if record["kind"] == "train"]
        timing = json_lines(folder / "timing.jsonl") if (folder / "timing.jsonl").exists() else []
        summary, split = _optional(folder / "summary.json"), _optional(folder / "split.json")
        numbers = {key: finite(summary[key]) for key in (*FINAL, "seconds") if summary.get(key) is not None}
        if summary and not set(FINAL) <= set(summary):
            raise ValueError(f"summary.json lacks one of {', '.join(FINAL)}")
        return Run(
            folder,
            str(config["label"]),
            {**config["options"], "seed": int(config["options"].get("seed", 0))},
            [step for step, _ in evaluations],
            [accuracy for _, accuracy in evaluations],
            {**summary, **numbers} or None,
            [{**_numbers(record), "step": _step(record["step"])} for record in training],
            _times(timing),
            finite(timing[-1]["images_per_second"]) if timing else None,
            split.get("sha256"),
            split.get("data_sha256"),
            {**config.get("environment", {}), **config.get("software", {})},
        )
    except Exception as error:  # what a foreign folder holds can fail in any way where it is used
        raise DatasetError(
            f"{folder} is not the directory of a run ({error}): give the --output of a trainer."
        ) from error


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: finite(value) for name, value in record.items() if isinstance(value, int | float)}


def _step(value: Any) -> int:
    if int(value) < 1:
        raise ValueError(f"it has a line of step {value}")
    return int(value)


def _optional(path: Path) -> dict[str, Any]:
    return {**read_json(path)} if path.exists() else {}


def _times(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Step and seconds of each line; steps that a resumed run took again replace the first time."""
    times: list[tuple[int, float]] = []
    for line in lines:
        while times and times[-1][0] >= _step(line["step"]):
            times.pop()
        times.append((_step(line["step"]), finite(line["seconds"])))
    return times


# Options in a group's name, where fewer tell it from all others; the report's table of differences has them all.
MOST_TOLD = 3
# What is compared by its SHA-256, and shown as the place that an option names.
_FILES = {"data": "data_dir", "init_sha256": "init_from"}


@dataclass(frozen=True)
class Group:
    """Runs of the same options and data; only the seed differs."""

    name: str  # Their label, with the options that tell them from other groups of the same label.
    runs: tuple[Run, ...]  # By seed, rising.

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that came to their end."""
        return tuple(run for run in self.runs if run.summary is not None)


def _deciding(run: Run) -> dict[str, Any]:
    """What decides its numbers beside the seed: its label, its data wherever they lie, and its options."""
    options = {name: value for name, value in run.options.items() if name not in HARMLESS | {"seed", "dataset"}}
    return {"label": run.label, "data": run.data or run.source, **options}


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What tells runs apart, without their seeds: option to its text for each run.

    The text is the same where, and only where, the value is the same. Files are named, with digits of their SHA-256
    only where their paths are the same.
    """
    deciding, found = [_deciding(run) for run in runs], {}
    for name in dict.fromkeys(name for one in deciding for name in one):
        values = [json.dumps(one.get(name, "(absent)"), sort_keys=True) for one in deciding]
        if len(set(values)) == 1:
            continue
        first = {value: k for k, value in reversed(list(enumerate(values)))}  # whose text stands for all of that value
        for form in range(3):
            texts = {v: _text(runs[k], name, deciding[k].get(name, "(absent)"), form) for v, k in first.items()}
            if len(set(texts.values())) == len(texts):
                break
        found[_FILES.get(name, name).removesuffix("_dir")] = [texts[value] for value in values]
    return found


def _text(run: Run, name: str, value: Any, form: int) -> str:
    """A value for people: in a short form, a longer one, and one that leaves nothing out."""
    if name not in _FILES or value is None:
        return shown(value) if form == 0 else str(value)
    path = str(run.options.get(_FILES[name]))
    if name == "data" and run.options.get("dataset") != "folder":
        path = run.source
    return Path(path).name if form == 0 else path if form == 1 else f"{path} ({str(value)[:8]})"


def group_runs(runs: list[Run]) -> list[Group]:
    """Put runs that differ in their seed alone together."""
    members: dict[str, dict[int, Run]] = {}
    for run in runs:
        same = members.setdefault(json.dumps(_deciding(run), sort_keys=True), {})
        if run.seed in same:
            raise DatasetError(
                f"{same[run.seed].folder} and {run.folder} are one run twice: the same options and seed {run.seed}. "
                "Give one of them."
            )
        same[run.seed] = run
    sets = [tuple(same[seed] for seed in sorted(same)) for same in members.values()]
    return [Group(name, own) for name, own in zip(_names([own[0] for own in sets]), sets, strict=True)]


def _names(runs: list[Run]) -> list[str]:
    """A name for each, unlike all others: its label, and as few options as tell it apart, or three of them."""
    names: dict[int, str] = {}
    for label in dict.fromkeys(run.label for run in runs):
        places = [k for k, run in enumerate(runs) if run.label == label]
        told = differences([runs[k] for k in places])
        needed: list[str] = []
        apart = 1
        for name in told:
            now = len(set(zip(*(told[one] for one in (*needed, name)), strict=True)))
            if now > apart:
                needed, apart = [*needed, name], now
        extra = [name for name in told if name not in needed][: max(0, MOST_TOLD - len(needed))]
        kept = [name for name in told if name in [*needed, *extra]]
        more = [f"{len(told) - len(kept)} more"] if len(told) > len(kept) else []
        for position, k in enumerate(places):
            names[k] = ", ".join([label, *(f"{name} {told[name][position]}" for name in kept), *more])
    return [names[k] for k in range(len(runs))]
