"""The runs behind the tables: which there are, at which budget, and what state each is in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.claims import CIFAR10, CIFAR100, CLAIMS, IMAGENET
from trainer.cli import parse_config
from trainer.config import HARMLESS, Config, option_differences, preset_config, resolve
from trainer.errors import OptionError, ResumeError
from trainer.files import json_lines, read_json, readable, write_json
from trainer.option_checks import parse_arch

# What makes each row. Tables share them: a run is made once.
_TERM = {"method": "fixmatch", "ggcr_weight": 0.1, "ggcr_criterion": "cosine"}
LONGER = "fixmatch-longer"  # with `Budget.longer` times the steps
LAST_BLOCK = "LAST_BLOCK"  # stands for the prefix of its parameters, which depends on --arch
_SETTINGS: dict[str, dict[str, Any]] = {
    "weak-constant": {"ggcr_stop_gradient": "weak"},
    "projected": {"ggcr_projection": "kronecker:16"},
    "max-pairs": {"ggcr_max_pairs": 8},
    "last-block": {"ggcr_encoder": LAST_BLOCK},
    "every-pair": {"ggcr_gate": "all"},
    "observed": {"ggcr_batchnorm": "observed"},
    "running": {"ggcr_batchnorm": "running"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "fixmatch": _TERM | {"ggcr_weight": 0.0},
    "flexmatch": _TERM | {"method": "flexmatch", "ggcr_weight": 0.0},
    "ggcr": _TERM,
    "ggcr-no-warmup": _TERM | {"ggcr_warmup": 0},
    # The paper gives no weight for it: the same lambda.
    "gradient-norm": _TERM | {"ggcr_criterion": "gradient-norm"},
    **{f"ggcr-{weight}": _TERM | {"ggcr_weight": weight} for weight in (0.01, 0.05, 0.5, 1.0, 3.0, 10.0)},
    **{f"ggcr-{name}": _TERM | options for name, options in _SETTINGS.items()},
    **{
        f"ggcr-1.0-{name}": _TERM | {"ggcr_weight": 1.0} | _SETTINGS.get(name, {"ggcr_warmup": 0})
        for name in ("weak-constant", "every-pair", "last-block", "no-warmup")
    },
    "supervised": _TERM | {"method": "supervised", "ggcr_weight": 0.0},
    LONGER: _TERM | {"ggcr_weight": 0.0},
}
# Options of the trainer that the grid sets itself.
OWN = {"preset", "seed", "output", *_TERM}


@dataclass(frozen=True)
class Budget:
    """How much to spend on each run."""

    text: str  # One line for `--help`.
    seeds: int  # Runs of each variant, unless `--seeds` says otherwise.
    options: dict[str, Any]  # Of the trainer, for every run.
    columns: dict[str, dict[str, Any]]  # Column of the paper's tables to the options of the data that stand for it.
    # On one core of an x86-64 CPU, without and with the term: a first guess for `--list`, replaced by this machine's
    # own times as soon as there are some.
    seconds_per_step: tuple[float, float]
    one_thread: bool = False  # Images so small that more threads than one are slower.

    @property
    def longer(self) -> float:
        """How many steps FixMatch takes in the time of one of GGCR's."""
        plain, with_term = self.seconds_per_step
        return with_term / plain


_CIFAR: dict[str, dict[str, Any]] = {
    CIFAR10: {"dataset": "cifar10", "labels": 40},
    CIFAR100: {"dataset": "cifar100", "labels": 400},
}

BUDGETS = {
    "smoke": Budget(
        "embedded digits, 12 steps: does it run?", 2,
        {
            "preset": "demo", "steps": 12, "batch_size": 4, "unlabeled_ratio": 2, "threshold": 0.12,
            "unlabeled_ramp": 6, "ggcr_warmup": 4, "eval_every": 4, "checkpoint_every": 4, "log_every": 2,
        },
        {CIFAR10: {"labels": 20}}, (0.02, 0.05), one_thread=True,
    ),
    "demo": Budget(
        "embedded digits, 200 steps of a tiny network: minutes on a CPU", 3,
        {"preset": "demo", "steps": 200, "unlabeled_ramp": 50, "ggcr_warmup": 50, "eval_every": 10, "log_every": 10},
        {CIFAR10: {"labels": 40}}, (0.07, 0.11), one_thread=True,
    ),
    "photos": Budget(
        "four classes of CIFAR-10 (airplane, automobile, bird, cat) as photographs in cifar10-jpeg-4/, at 16x16,"
        " 1,000 steps of a tiny network: hours on a CPU", 5,
        {
            "preset": "paper", "dataset": "folder", "data_dir": "cifar10-jpeg-4", "image_size": 16, "arch": "wrn-10-1",
            "steps": 1000, "batch_size": 8, "unlabeled_ratio": 3, "unlabeled_ramp": 0, "strong": "fixmatch",
            "ggcr_warmup": 100, "eval_every": 100, "checkpoint_every": 250, "log_every": 25,
        },
        {CIFAR10: {"labels": 40}}, (0.06, 0.19), one_thread=True,
    ),
    "small": Budget(
        "CIFAR, wrn-16-2, 20,000 steps of 32 + 224 images, at most 32 pairs", 3,
        {
            "preset": "paper", "arch": "wrn-16-2", "steps": 20_000, "batch_size": 32, "unlabeled_ramp": 1000,
            "ggcr_max_pairs": 32, "eval_every": 500, "checkpoint_every": 500,
        },
        # From benchmarks/results/step_cost.json as below, for 4 times its images and half its depth.
        _CIFAR, (4.0, 7.0),
    ),
    # 8 times the steps of 64 images in benchmarks/results/step_cost.json.
    "paper": Budget("the paper's own: CIFAR, wrn-28-2, 2^20 steps of 64 + 448 images", 5, {"preset": "paper"},
                    _CIFAR, (17.0, 94.0)),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    column: str  # Column of the paper's tables.
    variant: str  # Key of `VARIANTS`.
    config: Config  # Its options, resolved.
    arguments: tuple[str, ...]  # The trainer's command line.

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(str(self.config.output))

    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.folder / "summary.json").exists()

    @property
    def has_term(self) -> bool:
        """Whether it computes per-sample gradients, which is what steps differ by in cost."""
        return self.config.ggcr_weight > 0

    def steps_done(self) -> int:
        """Steps behind its last complete line of metrics."""
        path = self.folder / "metrics.jsonl"
        lines = json_lines(path) if path.exists() else []
        return int(lines[-1]["step"]) if lines else 0


@dataclass(frozen=True)
class Grid:
    """All cells of some tables at one budget."""

    folder: Path  # Where they are.
    budget: str  # Key of `BUDGETS`.
    tables: tuple[str, ...]  # Keys of `trainer.claims.CLAIMS`.
    cells: tuple[Cell, ...]  # Seed by seed, so that an interrupted grid has its pairs.
    absent: dict[str, str]  # Column that is not run to the reason.

    def protocol(self) -> dict[str, dict[str, Any]]:
        """Column to the options of its GGCR runs that decide numbers; the other variants change what they name."""
        return {
            cell.column: {
                name: value
                for name, value in dataclasses.asdict(cell.config).items()
                if name not in HARMLESS | {"seed"}
            }
            for cell in self.cells
            if cell.variant == "ggcr"
        }

    def claim_grid(self) -> None:
        """Write what this grid's folder is for, or compare with what is there."""
        path = self.folder / "grid.json"
        now: dict[str, Any] = {"format": 1, "budget": self.budget, "protocol": self.protocol()}
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, now)
            return
        with readable(path):
            stored = read_json(path)
            different = [f"--budget: {stored['budget']} there, {self.budget} now"] * (stored["budget"] != self.budget)
            columns = {**stored["protocol"]}
            for column in sorted(columns.keys() & now["protocol"].keys()):
                told = option_differences(columns[column], now["protocol"][column])
                different += [f"{column}, {text}" for text in told]
        if different:
            raise ResumeError(
                f"{self.folder} holds a grid with another protocol, and tables must not mix them:\n  "
                + "\n  ".join(different)
                + "\nGive the same options to continue it, or another --output."
            )
        if now["protocol"].keys() - columns.keys():
            write_json(path, {**now, "protocol": {**now["protocol"], **columns}})


def build_grid(
    folder: Path, budget: str, tables: Sequence[str], seeds: int | None, trainer_options: Sequence[str]
) -> Grid:
    """Lay out the cells of some tables, with seeds 0, 1, ... of each variant, as many as the budget says by default.

    The trainer's options are for every run, as on its command line; they win over the budget's.
    """
    chosen, given = BUDGETS[budget], {_name(word) for word in trainer_options if word.startswith("--")}
    if own := sorted(given & OWN):
        raise OptionError(f"--{own[0].replace('_', '-')} is set by the grid for each run: leave it out.")
    absent = {IMAGENET: "the ImageNet trainer needs your own copy of the images, and is no part of this grid"}
    if CIFAR100 not in chosen.columns:
        absent[CIFAR100] = f"budget {budget} has no data with 100 classes"
    columns = dict(chosen.columns)
    if "dataset" in given:
        columns = {CIFAR10: {**columns[CIFAR10]}}
        absent.setdefault(CIFAR100, "--dataset names one data set, which stands for CIFAR-10")
    wanted = dict.fromkeys(
        (column, variant)
        for table in tables
        for column in CLAIMS[table].columns
        for variant in CLAIMS[table].rows.values()
        if column in columns
    )
    bases: dict[tuple[str, str], tuple[Config, tuple[str, ...]]] = {}
    common = {name: (*_arguments({**chosen.options, **columns[name]}), *trainer_options) for name, _ in wanted}
    parsed = {name: parse_config(words) for name, words in common.items()}
    for column, variant in wanted:
        arguments = (*common[column], *_arguments(_own_options(variant, parsed[column], chosen.longer)))
        bases[column, variant] = (parse_config(arguments), arguments)
    cells = []
    for seed in range(chosen.seeds if seeds is None else seeds):
        for (column, variant), (config, arguments) in bases.items():
            place = str(folder / "cells" / f"{config.dataset}-{config.labels}-{variant}-seed{seed}")
            settled = resolve(dataclasses.replace(config, seed=seed, output=place))
            cells.append(Cell(column, variant, settled, (*arguments, *_arguments({"seed": seed, "output": place}))))
    return Grid(folder, budget, tuple(tables), tuple(cells), absent)


def _own_options(variant: str, common: Config, longer: float) -> dict[str, Any]:
    """The options of a variant, where they depend on those that all variants have."""
    options = dict(VARIANTS[variant])
    if variant == LONGER:
        options["steps"] = round(common.steps * longer)
    if options.get("ggcr_encoder") == LAST_BLOCK:
        depth, _ = parse_arch(common.arch)
        options["ggcr_encoder"] = f"encoder.{(depth - 4) // 2}."  # three groups of (depth - 4) / 6 blocks, from 1 on
    return options


def papers_protocol(column: str) -> dict[str, Any]:
    """Options of the paper's own protocol for a column, resolved."""
    return dataclasses.asdict(resolve(dataclasses.replace(preset_config("paper"), **_CIFAR[column])))


def _name(word: str) -> str:
    return word.split("=")[0].removeprefix("--").replace("-", "_")


def _arguments(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
