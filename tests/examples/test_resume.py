from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.training
from support.processes import run_program, started
from support.runs import MakeConfig, differing, final, option, stepped, take, trained, unequal
from trainer.checkpoint import load_latest, save_checkpoint
from trainer.config import Config
from trainer.errors import CheckpointError, NonFiniteLossError, ResumeError
from trainer.files import read_json, write_json
from trainer.runlog import MetricsFile
from trainer.step import Trainer
from trainer.training import main, run

SCRIPT = Path(trainer.training.__file__).parents[1] / "fixmatch_cifar.py"


@pytest.fixture(scope="module")
def whole(tiny_at: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run of `tiny()`, for all tests to compare with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(tiny_at(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(tiny_at: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of such a run that stopped after 7 of 12 steps, with a checkpoint at 5 before."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert run(tiny_at(folder, stop_after_steps=7)) == 0
    return folder


@pytest.fixture
def cut(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, which the test may damage or continue: the run directory of `tiny("cut")`."""
    return Path(shutil.copytree(stopped, tmp_path / "cut"))


def kill_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The process dies (as far as the trainer can tell) after so many steps."""
    step, taken = Trainer.train_step, []

    def dying(self: Trainer, images: Any) -> None:
        if len(taken) == steps:
            raise SystemExit(137)
        taken.append(1)
        step(self, images)

    monkeypatch.setattr(Trainer, "train_step", dying)


def test_a_stopped_run_continues_bitwise(whole: Path, tiny: MakeConfig) -> None:
    stop = random.SystemRandom().randrange(1, 12)
    assert run(tiny("cut", stop_after_steps=stop)) == 0
    assert final(tiny("cut").output)[".step"] == stop
    assert run(tiny("cut", stop_after_minutes=1e-9)) == 0  # one more step
    assert run(tiny("cut")) == 0
    assert differing(whole, tiny("cut").output) == [], f"stopped after {stop} steps"


@pytest.mark.parametrize(("steps", "kept"), [(9, 5), (4, None)], ids=["after a checkpoint", "before the first one"])
def test_a_killed_run_continues_bitwise_from_its_last_checkpoint_or_starts_again(
    whole: Path, tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, steps: int, kept: int | None
) -> None:
    kill_after(monkeypatch, steps)
    with pytest.raises(SystemExit):
        run(tiny("cut"))
    monkeypatch.undo()
    output = Path(str(tiny("cut").output))
    if kept is not None:
        assert final(output)[".step"] == kept
        assert len((output / "metrics.jsonl").read_text().splitlines()) == 5  # logs at 3, 6, 9, evaluations at 4, 8
    assert run(tiny("cut")) == 0
    assert differing(whole, output) == []


@pytest.mark.parametrize("method", ["flexmatch", "mixmatch", "meanteacher", "temporalensembling", "softmatch"])
def test_the_state_of_a_method_is_in_the_checkpoint(tiny: MakeConfig, tmp_path: Path, method: str) -> None:
    config = tiny(method=method, threshold=None, steps=6, unlabeled_ramp=3, ggcr_warmup=4)
    whole, _ = stepped(config, 6)
    first, dataset = stepped(config, 3)
    save_checkpoint(tmp_path, 3, first.state_dict())
    second, _ = stepped(config, 0)
    second.load_state_dict(load_latest(tmp_path) or {})
    take(second, dataset, range(3, 6))
    assert unequal(whole.state_dict(), second.state_dict()) == []


@pytest.mark.parametrize("part", ["method", "average", "optimizer", "meter", "evaluations", "step"])
def test_every_part_of_the_state_is_needed(
    whole: Path, cut: Path, tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    # The control of the tests above: a checkpoint that forgets one part must be noticed.
    load = Trainer.load_state_dict
    monkeypatch.setattr(Trainer, "load_state_dict", lambda self, state: load(self, {**state, part: fresh(self, part)}))
    run(tiny("cut"))
    monkeypatch.undo()
    assert differing(whole, tiny("cut").output) != []


def fresh(trainer: Trainer, part: str) -> Any:
    return 6 if part == "step" else trainer.state_dict()[part]


# That a real SIGKILL, at a moment nobody chose, is survived on each feed; tests/slow/kills.py tries hundreds.
@pytest.mark.parametrize("feed", ["memory", "stream"])
def test_a_real_sigkill_is_survived_bitwise(tiny: MakeConfig, photographs: MakeConfig, feed: str) -> None:
    common = {"steps": 24, "log_every": 1, "checkpoint_every": 5, "eval_every": 12}
    make, script = (tiny, "fixmatch_cifar.py") if feed == "memory" else (photographs, "fixmatch_imagenet.py")
    undisturbed, config = make("whole", **common), make("killed", **common)
    assert run(undisturbed) == 0
    given = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("recipe", "processes")}
    arguments = [part for name, value in given.items() for part in option(name, value)]
    metrics = Path(str(config.output)) / "metrics.jsonl"
    chance, deadline = random.SystemRandom(), time.monotonic() + 120
    lines = chance.randrange(1, 17)
    victim = started(run_program, str(SCRIPT.with_name(script)), arguments)
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
        assert victim.is_alive(), victim.exitcode
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.1))
    victim.kill()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert differing(str(undisturbed.output), trained(config)) == []


def test_an_older_checkpoint_that_a_kill_left_is_forgotten(whole: Path, tiny: MakeConfig) -> None:
    """A kill after the last checkpoint of a run, and before the one too many was removed; no later save does it."""
    config = tiny("left", progress="none")
    folder = Path(str(config.output))
    shutil.copytree(whole, folder)
    stored = read_json(folder / "config.json")
    write_json(folder / "config.json", {**stored, "options": {**stored["options"], "output": str(folder)}})
    (folder / "summary.json").unlink()
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    for suffix in (".pt", ".json"):
        shutil.copy(
            folder / "checkpoints" / Path(kept[0]).with_suffix(suffix),
            folder / "checkpoints" / f"step-00000000{suffix}",
        )
    assert run(config) == 0
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == kept
    assert differing(whole, folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_says_how_to_continue(
    whole: Path, tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    step = Trainer.train_step

    def interrupted(self: Trainer, images: Any) -> None:
        step(self, images)
        if self.step == 7:  # to the process group: loader workers get it too
            workers = multiprocessing.active_children()
            assert workers
            for process in (*workers, multiprocessing.current_process()):
                os.kill(process.pid or 0, number)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    before = signal.getsignal(number)
    assert run(tiny("cut", progress="lines", workers=1)) == 128 + number
    assert not multiprocessing.active_children()
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name} at step 7 of 12; checkpoint written" in said
    assert "Start the same command again to continue." in said
    assert run(tiny("cut")) == 0
    assert differing(whole, tiny("cut").output) == []


def test_a_finished_run_says_so(whole: Path, tiny: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert main(tiny(output=str(whole), data_dir="elsewhere")) == 0
    assert "is finished: last accuracy" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_other_options_are_refused_and_named(whole: Path, tiny: MakeConfig) -> None:
    with pytest.raises(ResumeError, match=r"--lr: 0.03 there, 0.1 now; --seed: 0 there, 4 now.*another --output"):
        run(tiny(output=str(whole), lr=0.1, seed=4))


def test_harmless_options_may_change(whole: Path, cut: Path, tiny: MakeConfig) -> None:
    changed = tiny("cut", workers=0, checkpoint_every=2, device="cpu", progress="lines", tensorboard=False)
    assert run(changed) == 0
    assert differing(whole, changed.output) == []


def test_resume_never_refuses_a_used_directory(whole: Path, tiny: MakeConfig) -> None:
    with pytest.raises(ResumeError, match=r"--resume never, but .* holds a run"):
        run(tiny(output=str(whole), resume="never"))


def test_a_checkpoint_of_another_model_is_refused(cut: Path, tiny: MakeConfig) -> None:
    stored = read_json(cut / "config.json")
    stored["options"]["arch"] = "wrn-10-2"
    write_json(cut / "config.json", stored)
    with pytest.raises(CheckpointError, match=r"does not fit this run .*another --output"):
        run(tiny("cut", arch="wrn-10-2"))


def test_two_processes_cannot_share_a_directory(cut: Path, tiny: MakeConfig) -> None:
    pytest.importorskip("fcntl", reason="advisory locks are a POSIX feature")
    config = tiny("cut")
    hold = f"import fcntl; file = open({str(cut / '.lock')!r}, 'w'); fcntl.lockf(file, 2)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()  # type: ignore[union-attr]
        with pytest.raises(ResumeError, match="is in use by another process"):
            run(config)
        other.communicate(b"\n")
    assert run(config) == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(
    cut: Path, tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("cut")
    before = final(config.output)
    step = Trainer.train_step

    def poisoned(self: Trainer, images: Any) -> None:
        if self.step == 8:
            with torch.no_grad():
                self.model.head.bias[0] = float("nan")
        step(self, images)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 8: the loss is nan; terms: \['loss_supervised'.*untouched"):
        run(config)
    after = final(config.output)
    assert before.keys() == after.keys()
    assert after[".step"] == 7
    assert main(config) == 1
    assert "error: step 8: the loss is nan" in capsys.readouterr().err


def test_a_disk_that_fails_in_mid_run_is_one_line_and_loses_nothing(
    whole: Path, cut: Path, tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("cut")
    monkeypatch.setattr(MetricsFile, "write", lambda *_: (_ for _ in ()).throw(OSError("disk on fire")))
    assert main(config) == 1
    assert "error: disk on fire. Checkpoints are untouched" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(config) == 0
    assert differing(whole, cut) == []


def test_a_gradient_that_is_not_finite_stops_the_run(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    built = trainer.step.build_method

    def with_bad_gradient(model: Any, config: Config, samples: int) -> Any:
        model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
        return built(model, config, samples)

    monkeypatch.setattr(trainer.step, "build_method", with_bad_gradient)
    with pytest.raises(NonFiniteLossError, match=r"step 0: the gradient of head.weight is not finite"):
        run(tiny())


def test_metrics_hold_what_a_reader_asks_for(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [4, 8, 12]
    wanted = {
        "loss", "loss_supervised", "loss_unsupervised", "mask_rate", "lr", "pseudo_label_accuracy",
        "confident_accuracy", "unlabeled_weight", "ggcr_weight", "ggcr_loss", "ggcr_cosine", "ggcr_degenerate",
        "ggcr_pairs",
    }  # fmt: skip
    assert wanted <= train[-1].keys()
    summary = read_json(whole / "summary.json")
    accuracies = [line["test_accuracy"] for line in lines if line["kind"] == "eval"]
    assert summary["last"] == accuracies[-1]
    assert summary["best"] == max(accuracies)
    assert summary["median_last_20"] == sorted(accuracies)[1]
    assert "test accuracy of the averaged (EMA) model" in summary["protocol"]
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
