from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import trainer.loader
from support.runs import MakeConfig
from trainer.loader import JUDGED_STEPS, WARMUP_STEPS, LoaderWatch, StepDataset
from trainer.step import Trainer
from trainer.training import run


def advice(watch: LoaderWatch, waited: float, stepped: float) -> list[tuple[int, str]]:
    """After which step the watch says what, in 200 steps."""
    said = [(step, watch.add(waited, stepped)) for step in range(1, 201)]
    return [(step, text) for step, text in said if text is not None]


def test_waiting_is_said_once_with_a_remedy() -> None:
    ((step, text),) = advice(LoaderWatch(2, 7), 0.030, 0.010)
    assert step == WARMUP_STEPS + JUDGED_STEPS
    assert text == (
        "note: the data loader is the bottleneck: steps 11 to 50 waited 30.0 ms of 40.0 ms each for their images "
        "(75%), prepared by 2 worker processes: give --workers 4 (now 2)."
    )


@pytest.mark.parametrize(
    ("workers", "spare", "remedy"),
    [
        (0, 3, "prepared by no worker processes: give --workers 2 (now 0)"),
        (3, 5, "give --workers 5 (now 3)"),
        (3, 3, "all cores are busy, so only more of them or a cheaper --strong help"),
        (0, 0, "all cores are busy"),
    ],
)
def test_the_remedy_is_one_that_the_machine_has(workers: int, spare: int, remedy: str) -> None:
    assert remedy in advice(LoaderWatch(workers, spare), 1.0, 1.0)[0][1]


def test_the_term_that_comes_later_is_mentioned() -> None:
    assert "which joins later" in advice(LoaderWatch(1, 1, term_later=True), 1.0, 1.0)[0][1]


def test_a_loader_that_keeps_up_is_not_mentioned() -> None:
    watch = LoaderWatch(1, 1)
    assert advice(watch, 0.019, 0.081) == []
    assert watch.share == pytest.approx(0.19)


def test_the_first_steps_do_not_count() -> None:
    watch = LoaderWatch(1, 1)
    for _ in range(WARMUP_STEPS):
        assert watch.add(10.0, 0.1) is None
    assert advice(watch, 0.001, 0.1) == []


@pytest.mark.parametrize("slow", [True, False])
def test_a_slow_data_set_is_noticed_in_a_run(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slow: bool
) -> None:
    monkeypatch.setattr(trainer.loader, "WARMUP_STEPS", 2)
    monkeypatch.setattr(trainer.loader, "JUDGED_STEPS", 4)
    built = StepDataset.__getitem__

    def delayed(self: StepDataset, step: int) -> Any:
        images = built(self, step)
        time.sleep(0.3 * slow)
        return images

    monkeypatch.setattr(StepDataset, "__getitem__", delayed)
    # The fast one waits for nothing: its step is made long instead, however busy the machine.
    step = Trainer._gradient
    monkeypatch.setattr(
        Trainer, "_gradient", lambda self, *given: (time.sleep(0.3 * (not slow)), step(self, *given))[1]
    )
    config = tiny(method="supervised", steps=8, eval_every=8, log_every=4, progress="lines")
    assert run(config) == 0
    assert capsys.readouterr().err.count("the data loader is the bottleneck: steps 3 to 6 waited") == slow
    lines = [json.loads(line) for line in (Path(str(config.output)) / "timing.jsonl").read_text().splitlines()]
    assert (lines[-1]["waiting"] > 0.5) == slow
