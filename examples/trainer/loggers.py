"""Where the numbers of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, and a CSV file."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib
import importlib.util
import io
import re
from pathlib import Path

from trainer.config import Config
from trainer.errors import OptionError
from trainer.files import json_lines, write_atomically


class Loggers:
    """Those that the options ask for, if any; what a killed process wrote after `step` counts no longer."""

    def __init__(self, config: Config | None = None, folder: Path = Path(), step: int = 0) -> None:
        self.board = self.wandb = self.mlflow = None
        if config is None:
            return
        if config.tensorboard:
            board = importlib.import_module("torch.utils.tensorboard")
            self.board = board.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        options, name = dataclasses.asdict(config), folder.name
        if config.wandb:
            wandb = importlib.import_module("wandb")
            self.wandb = wandb.init(project="gradconsist", name=name, id=_id(folder), resume="allow", config=options)
        if config.mlflow:
            self.mlflow = importlib.import_module("mlflow")
            self.mlflow.set_experiment("gradconsist")
            found = self.mlflow.search_runs(filter_string=f"tags.run_directory = '{_id(folder)}'", output_format="list")
            self.mlflow.start_run(run_id=found[0].info.run_id if found else None, run_name=name)
            if not found:
                self.mlflow.set_tag("run_directory", _id(folder))
                self.mlflow.log_params(options)

    def write(self, kind: str, step: int, numbers: dict[str, float | None]) -> None:
        """Take the numbers of a step; those of training are below `train/`."""
        known = {name if kind == "eval" else f"train/{name}": v for name, v in numbers.items() if v is not None}
        if self.board is not None:
            for name, value in known.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(known, step=step)
        if self.mlflow is not None:
            # Class names are in them, of which it takes few characters.
            plain = {re.sub(r"[^\w\-. :/]", lambda sign: f"_{ord(sign[0]):x}_", name): v for name, v in known.items()}
            self.mlflow.log_metrics(plain, step=step)

    def close(self) -> None:
        """End what was begun."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.mlflow is not None:
            self.mlflow.end_run()


def _id(folder: Path) -> str:
    """The same for each call of a run."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def check_loggers(config: Config) -> None:
    """Refuse those that are not installed, before anything is read or written."""
    for package in ("tensorboard", "wandb", "mlflow"):
        if getattr(config, package) and importlib.util.find_spec(package) is None:
            raise OptionError(f"--{package} needs the {package} package: pip install {package}")


def write_csv(folder: Path) -> None:
    """Write `metrics.csv`: a row per line of metrics.jsonl, a column per number."""
    records = json_lines(folder / "metrics.jsonl")
    columns = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomically(folder / "metrics.csv", lambda file: file.write(text.getvalue().encode()))
