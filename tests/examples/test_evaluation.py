from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import trainer.runlog
from support.runs import MakeConfig, trained
from trainer.config import resolve
from trainer.datasets import load_images
from trainer.evaluation import Evaluated, Scores, evaluate, with_fresh_statistics
from trainer.loader import ToModel
from trainer.runlog import Progress
from trainer.weights import load_model


class Reader(nn.Module):
    """Reads the class that an image's red channel names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5.0 * nn.functional.one_hot((255 * x[:, 0, 0, 0]).round().long(), 4)


def test_fresh_statistics_are_those_of_the_training_images() -> None:
    """By hand for one layer; nothing of the model that is given changes, and no random stream does."""
    torch.manual_seed(3)
    pixels = torch.randint(0, 256, (20, 2, 2, 3), dtype=torch.uint8)
    to_model = ToModel([0.1, 0.2, 0.3], [0.5] * 3, torch.device("cpu"), channels_last=False)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.5), nn.Dropout(0.5)).train()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    fresh = with_fresh_statistics(model, pixels, to_model, batch=10)
    expected = (pixels.double() / 255 - torch.tensor([0.1, 0.2, 0.3])) / 0.5
    assert torch.allclose(fresh[0].running_mean.double(), expected.mean((0, 1, 2)), atol=1e-5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    halves = [expected[rows].flatten(0, 2).var(0) for rows in order.split(10)]
    assert torch.allclose(fresh[0].running_var.double(), (halves[0] + halves[1]) / 2, atol=1e-5)
    assert not any(module.training for module in fresh.modules())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    # 4 of 24 images are left over: a batch of four would weigh as much as one of ten
    more = with_fresh_statistics(model, torch.cat([pixels, pixels[:4]]), to_model, images=24, batch=10)
    assert int(more[0].num_batches_tracked) == 2


def test_the_statistics_that_are_evaluated_are_exported(tiny: MakeConfig) -> None:
    buffers = {}
    for statistics in ("averaged", "anew"):
        config = tiny(statistics, steps=4, eval_every=4, eval_statistics=statistics)
        folder = trained(config)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["protocol"].endswith(f"BatchNorm statistics {statistics}")
        model, _ = load_model(folder / "model.safetensors")
        images = load_images(resolve(config))
        to_model = ToModel(*images.channel_statistics, torch.device("cpu"), channels_last=False)
        assert evaluate(model, Evaluated(images.test_x, images.test_y), to_model, 10).accuracy == summary["last"]
        buffers[statistics] = model.state_dict()
    same = {name for name, value in buffers["anew"].items() if torch.equal(value, buffers["averaged"][name])}
    assert same == {name for name in buffers["anew"] if "running" not in name and "tracked" not in name}


def test_recall_is_the_share_of_a_class_that_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, labels = [0, 1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 2, 2]
    pixels = torch.tensor(answers, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
    to_model = ToModel([0.0] * 3, [1.0] * 3, torch.device("cpu"), channels_last=False)
    names = ["a", "b", "c", "d"]
    for batch in (2, 100):
        monkeypatch.setattr("trainer.evaluation.BATCH", batch)
        scores = evaluate(Reader(), Evaluated(pixels, torch.tensor(labels)), to_model, 4)
        numbers = scores.numbers("test", names)
        assert numbers["test_accuracy"] == 3 / 7
        assert [numbers[f"recall/{name}"] for name in names[:3]] == [1 / 2, 1 / 3, 1 / 2]
        assert math.isnan(numbers["recall/d"])
        losses = [math.log(math.exp(5) + 3) - 5 * (a == b) for a, b in zip(answers, labels, strict=True)]
        assert numbers["test_loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)
        assert scores.confusion[1].tolist() == [0, 1, 2, 0]
    many = [f"class {k}" for k in range(200)]
    few = Scores(torch.eye(200, dtype=torch.int64), 1.0, 0.0).numbers("test", many)
    assert set(few) == {"test_accuracy", "test_accuracy_top5", "test_loss"}


def test_recalls_and_precision_of_the_mask_are_in_metrics_and_tensorboard(tiny: MakeConfig) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="--tensorboard needs the tensorboard package"
    )
    config = tiny(steps=4, eval_every=2, log_every=2, tensorboard=True)
    folder = trained(config)
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
    monkeypatch.setattr(trainer.runlog.time, "monotonic", lambda: clock[0])
    progress = Progress("lines", 0, 1000, every=1e9)
    for seconds in [1.0] * 5 + [5.0] * 3:
        for _ in range(100):
            clock[0] += seconds
            progress.advance()
        progress.line()
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.endswith("15 min left")  # 900 steps of a second
    assert last.endswith("12 min left")  # 200 of 3.6, on the way to five; 8 minutes at the pace since the start
