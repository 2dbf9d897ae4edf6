from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import recipes.runlog
from recipes.config import Config
from recipes.evaluation import evaluate
from recipes.loader import ToModel
from recipes.runlog import Progress
from recipes.training import run

MakeConfig = Callable[..., Config]


class Reader(nn.Module):
    """Reads the class that an image's red channel names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5.0 * nn.functional.one_hot((255 * x[:, 0, 0, 0]).round().long(), 4)


def test_recall_is_the_share_of_a_class_that_is_found() -> None:
    answers, labels = [0, 1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 2, 2]
    pixels = torch.tensor(answers, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
    to_model = ToModel([0.0] * 3, [1.0] * 3, torch.device("cpu"), channels_last=False)
    names = ["a", "b", "c", "d"]
    for batch in (2, 100):
        numbers = evaluate(Reader(), pixels, torch.tensor(labels), to_model, batch=batch, classes=names)
        assert numbers["test_accuracy"] == 3 / 7
        assert [numbers[f"recall/{name}"] for name in names[:3]] == [1 / 2, 1 / 3, 1 / 2]
        assert math.isnan(numbers["recall/d"])
        losses = [math.log(math.exp(5) + 3) - 5 * (a == b) for a, b in zip(answers, labels, strict=True)]
        assert numbers["test_loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)
    assert set(evaluate(Reader(), pixels, torch.tensor(labels), to_model)) == {"test_accuracy", "test_loss"}


def test_recalls_and_precision_of_the_mask_are_in_metrics_and_tensorboard(tiny: MakeConfig) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="--tensorboard needs the tensorboard package"
    )
    config = tiny(steps=4, eval_every=2, log_every=2, tensorboard=True)
    assert run(config) == 0
    folder = Path(str(config.output))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    recalls = [last[f"recall/{digit}"] for digit in range(10)]
    # 36 or 35 of each digit are held out: the mean over classes is close to the accuracy, and not less exact than that.
    assert sum(recalls) / 10 == pytest.approx(last["test_accuracy"], abs=0.01)
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("recall/3")] == [2, 4]
    assert events.Scalars("recall/3")[-1].value == pytest.approx(last["recall/3"])
    assert {"test_accuracy", "train/mask_rate", "train/confident_accuracy"} <= set(events.Tags()["scalars"])


def test_the_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps take five times as long once the term has joined."""
    clock = [0.0]
    monkeypatch.setattr(recipes.runlog.time, "monotonic", lambda: clock[0])
    progress = Progress("lines", 0, 1000, every=1e9)
    for seconds in [1.0] * 5 + [5.0] * 3:
        for _ in range(100):
            clock[0] += seconds
            progress.advance()
        progress.line()
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.endswith("15 min left")  # 900 steps of a second
    assert last.endswith("12 min left")  # 200 of 3.6, on the way to five; 8 minutes at the pace since the start
