"""Run directories, finished or not, as records; and runs that differ in their seed alone as groups."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import HARMLESS
from trainer.errors import DatasetError
from trainer.evaluation import summarize
from trainer.files import read_json
from trainer.runlog import shown

# The accuracies of a finished run.
FINAL = ("last", "median_last_20", "best")


@dataclass(frozen=True)
class Run:
    """What a run directory says about itself.

    Attributes:
        folder: The run directory.
        label: What was trained, for legends.
        options: Its options.
        steps: Steps of each evaluation.
        accuracies: Test accuracy of each evaluation.
        summary: `summary.json`, or None while the run is unfinished.
        training: The lines of metrics.jsonl that average training steps.
        timing: Steps and the seconds of training behind them, rising.
        rate: Images per second of training, where it is known.
        split: SHA-256 of the labeled split, where it is known.
        environment: Where it was started: device, versions, revision.
    """

    folder: Path
    label: str
    options: dict[str, Any]
    steps: list[int]
    accuracies: list[float]
    summary: dict[str, Any] | None
    training: list[dict[str, Any]]
    timing: list[tuple[int, float]]
    rate: float | None
    split: str | None
    environment: dict[str, Any]

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.options["seed"])

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
    """Read a run directory, finished or not.

    Args:
        folder: The run directory.

    Returns:
        The run.

    Raises:
        DatasetError: Where it is not a run directory.
    """
    try:
        config = read_json(folder / "config.json")
        records = json_lines(folder / "metrics.jsonl")
        # Without a test part, what is known is of held-out images.
        accuracies = [
            (record["step"], record.get("test_accuracy", record.get("held_out_accuracy")))
            for record in records
            if record["kind"] == "eval"
        ]
        evaluations = [(int(step), float(accuracy)) for step, accuracy in accuracies if accuracy is not None]
        training = [record for record in records if record["kind"] == "train"]
        timing = json_lines(folder / "timing.jsonl") if (folder / "timing.jsonl").exists() else []
        summary = _optional(folder / "summary.json")
        numbers = {key: float(summary[key]) for key in (*FINAL, "seconds") if summary.get(key) is not None}
        if summary and not set(FINAL) <= set(summary):
            raise ValueError(f"summary.json lacks one of {', '.join(FINAL)}")
        return Run(
            folder,
            str(config["label"]),
            {**config["options"], "seed": int(config["options"].get("seed", 0))},
            [step for step, _ in evaluations],
            [accuracy for _, accuracy in evaluations],
            {**summary, **numbers} or None,
            [{**_numbers(record), "step": int(record["step"])} for record in training],
            _times(timing),
            float(timing[-1]["images_per_second"]) if timing else None,
            _optional(folder / "split.json").get("sha256"),
            {**config.get("environment", {}), **config.get("software", {})},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{folder} is not the directory of a run ({error}): give the --output of a trainer."
        ) from error


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if isinstance(value, int | float)}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; one that is being written, or that a kill cut off, has no end and does not count.

    Args:
        path: The file.

    Returns:
        The records.

    Raises:
        ValueError: Where a line is no JSON, or holds NaN or an infinity, which JSON does not have.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def _optional(path: Path) -> dict[str, Any]:
    return {**read_json(path)} if path.exists() else {}


def _times(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Step and seconds of each line; steps that a resumed run took again replace the first time."""
    times: list[tuple[int, float]] = []
    for line in lines:
        while times and times[-1][0] >= int(line["step"]):
            times.pop()
        times.append((int(line["step"]), float(line["seconds"])))
    return times


# Options in a group's name; the report's table of differences has them all.
MOST_TOLD = 3


@dataclass(frozen=True)
class Group:
    """Runs of the same options but the seed.

    Attributes:
        name: Their label, with the options that tell them from other groups of the same label.
        runs: By seed, rising.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def options(self) -> dict[str, Any]:
        """The options that all of them have, without the seed."""
        return _deciding(self.runs[0])

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that came to their end."""
        return tuple(run for run in self.runs if run.summary is not None)


def _deciding(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.options.items() if name not in HARMLESS | {"seed"}}


def group_runs(runs: list[Run]) -> list[Group]:
    """Put runs that differ in their seed alone together.

    Args:
        runs: At least one.

    Returns:
        The groups, in the order of their first runs.

    Raises:
        DatasetError: Where two runs have the same options and the same seed: they would count twice.
    """
    members: dict[str, dict[int, Run]] = {}
    for run in runs:
        same = members.setdefault(json.dumps([run.label, _deciding(run)], sort_keys=True), {})
        if run.seed in same:
            raise DatasetError(
                f"{same[run.seed].folder} and {run.folder} are one run twice: the same options and seed {run.seed}. "
                "Give one of them."
            )
        same[run.seed] = run
    sets = [tuple(same[seed] for seed in sorted(same)) for same in members.values()]
    return [Group(_name(own, sets), own) for own in sets]


def _name(own: tuple[Run, ...], sets: list[tuple[Run, ...]]) -> str:
    options, label = _deciding(own[0]), own[0].label
    others = [_deciding(other[0]) for other in sets if other is not own and other[0].label == label]
    telling = [name for name in options if any(other.get(name) != options[name] for other in others)]
    words = [f"{name} {shown(options[name])}" for name in telling[:MOST_TOLD]]
    more = [f"{len(telling) - MOST_TOLD} more"] if len(telling) > MOST_TOLD else []
    return ", ".join([label, *words, *more])
