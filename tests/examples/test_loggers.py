"""`--wandb` and `--mlflow` with the packages themselves, where they are installed: one run, also after a stop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from trainer.training import run

if TYPE_CHECKING:
    from trainer.config import Config

Make = Callable[..., "Config"]


def stopped_and_resumed(config: Config) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    for stop in (5, None):
        assert run(dataclasses.replace(config, stop_after_steps=stop)) == 0
    return [json.loads(line) for line in (Path(str(config.output)) / "metrics.jsonl").read_text().splitlines()]


def test_mlflow_has_each_number_once(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="--mlflow needs the mlflow package")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    lines = stopped_and_resumed(tiny(mlflow=True))
    (found,) = mlflow.search_runs(experiment_names=["gradconsist"], output_format="list")
    assert found.data.params["labels"] == "20"
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [
        (line["step"], line["loss"]) for line in lines if line["kind"] == "train"
    ]
    assert found.data.metrics["test_accuracy"] == lines[-1]["test_accuracy"]


def test_wandb_goes_on_with_the_same_run(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own `log` takes every number; that of an offline run cannot be read back."""
    wandb = pytest.importorskip("wandb", reason="--wandb needs the wandb package")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    begun: list[tuple[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    def begin(*, begin: Any = wandb.init, **options: Any) -> Any:
        own = begin(**options)
        begun.append((own.id, own.config["labels"]))
        log = own.log
        own.log = lambda numbers, step: (logged.append((step, numbers)), log(numbers, step=step))
        return own

    monkeypatch.setattr(wandb, "init", begin)
    lines = stopped_and_resumed(tiny(wandb=True))
    assert begun == [(begun[0][0], 20)] * 2
    assert [step for step, _ in logged] == [line["step"] for line in lines]
    assert logged[-1][1]["test_accuracy"] == lines[-1]["test_accuracy"]
