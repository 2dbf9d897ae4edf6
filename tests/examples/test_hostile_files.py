"""Files of a run and of a data set that are damaged, foreign or forged; `tests/slow/hostile_files.py` tries more."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.forgeries import ARCHIVES, PICKLES
from support.pictures import MakeFolder
from support.runs import MakeConfig, trained
from trainer.checkpoint import load_latest, remove_leftovers, save_checkpoint
from trainer.config import Config
from trainer.datasets import load_images
from trainer.errors import CheckpointError, DatasetError, OptionError, ResumeError
from trainer.folder import list_folder
from trainer.rundir import exclusive
from trainer.training import main, run


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((20, 20), float(step))}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints 5 and 10."""
    for step in (5, 10):
        save_checkpoint(tmp_path / "two", step, state(step))
    return tmp_path / "two"


def plant(folder: Path, content: bytes, **changes: Any) -> None:
    """A forged checkpoint 20 with a record that vouches for it."""
    folder.mkdir(exist_ok=True)
    (folder / "step-00000020.pt").write_bytes(content)
    record = {"format": 1, "step": 20, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "step-00000020.json").write_text(json.dumps(record | changes))


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its digest."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "other"
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", PICKLES)
def test_a_forged_pickle_is_refused_and_runs_nothing(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    plant(tmp_path / "run", PICKLES[name](canary))
    with pytest.raises(CheckpointError, match=r"step-00000020\.pt (is refused: .*Nothing in it was executed|holds a)"):
        load_latest(tmp_path / "run")
    assert not canary.exists()


def test_the_environment_cannot_switch_the_check_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    test_a_forged_pickle_is_refused_and_runs_nothing(tmp_path, "os.system as torch.save writes it")


@pytest.mark.parametrize("name", ["os.system in a bare pickle", "runpy"])
def test_the_forged_pickles_are_dangerous(tmp_path: Path, name: str) -> None:
    # The control of the test above.
    content = io.BytesIO(PICKLES[name](tmp_path / "canary"))
    if name == "runpy":
        torch.load(content, weights_only=False)
    else:
        pickle.load(content)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_forged_archive_of_cifar_is_never_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: MakeConfig, name: str
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    outside, data = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    data.mkdir()
    (data / "cifar-10-python.tar.gz").write_bytes(ARCHIVES[name](outside))
    before = tree(tmp_path)
    with pytest.raises(DatasetError, match=r"cifar-10-python.tar.gz there is not the published file.*no network"):
        load_images(tiny(dataset="cifar10", data_dir=str(data)))
    assert tree(tmp_path) == before


def test_forged_batches_of_cifar_are_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: MakeConfig
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / name).write_bytes(PICKLES["os.system in a bare pickle"](tmp_path / "canary"))
    with pytest.raises(DatasetError, match=r"is neither in --data-dir .* nor could it be downloaded .*no network"):
        load_images(tiny(dataset="cifar10", data_dir=str(tmp_path)))
    assert not (tmp_path / "canary").exists()


#: What a file can become, which then is at this path.
BECOME: dict[str, Callable[[Path], object]] = {
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "endless": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "deep": lambda path: path.write_text("[" * 100_000),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "shorter": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "lost": Path.unlink,
}
ODD = ("a pipe", "endless", "a loop", "a folder", "deep", "bytes")


@pytest.mark.parametrize("suffix", [".pt", ".json"])
@pytest.mark.parametrize("become", ODD)
def test_a_checkpoint_that_is_no_file_is_skipped(two: Path, become: str, suffix: str) -> None:
    BECOME[become](two / f"step-00000010{suffix}")
    assert load_latest(two)["step"] == 5  # type: ignore[index]


RUN_FILES = [
    *((name, become, rf"{name} cannot be read .*restore it, or give another --output")
      for name in ("config.json", "split.json") for become in ODD if become != "a loop"),
    *((name, become, rf"({name} is missing from|a run without its {name}).*restore it, or give")
      for name in ("config.json", "split.json") for become in ("a loop", "lost")),
    *(("metrics.jsonl", become, r"metrics.jsonl has 0 bytes, but the checkpoint was taken when it had")
      for become in ("lost", "a pipe")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "become", "message"), RUN_FILES)
def test_a_run_file_that_is_no_file_or_lost_is_refused(
    tiny: MakeConfig, begun: Path, name: str, become: str, message: str
) -> None:
    BECOME[become](begun / name)
    with pytest.raises((ResumeError, CheckpointError), match=message):
        run(tiny("begun", method="supervised"))


@pytest.fixture(scope="module")
def stopped(tiny_at: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that stopped after 6 of 12 steps."""
    config = tiny_at(tmp_path_factory.mktemp("stopped") / "run", method="supervised", stop_after_steps=6)
    return trained(config)


@pytest.fixture
def begun(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, which the test may damage: the run directory of `tiny("begun", method="supervised")`."""
    return Path(shutil.copytree(stopped, tmp_path / "begun"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", ""),
        ("{}", ""),
        ('{"options": [[null, 1]], "environment": {}, "format": 1}', ""),
        ('{"options": {}, "environment": 3, "format": 1}', ""),
        ('{"options": {}, "environment": {}, "format": 2}', r" \(its format is 2, this trainer reads 1\)"),
    ],
)
def test_a_config_of_another_form_is_refused(tiny: MakeConfig, begun: Path, text: str, reason: str) -> None:
    (begun / "config.json").write_text(text)
    with pytest.raises(ResumeError, match=f"config.json cannot be read{reason}"):
        run(tiny("begun", method="supervised"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"last": "x"}'])
def test_a_damaged_summary_is_refused_and_can_be_made_anew(tiny: MakeConfig, begun: Path, text: str) -> None:
    (begun / "summary.json").write_text(text)
    with pytest.raises(ResumeError, match=r"summary.json cannot be read .*remove it, and the same command writes"):
        run(tiny("begun", method="supervised"))


def test_a_line_of_the_log_that_changed_is_refused(
    tiny: MakeConfig, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = begun / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"train", b"trail", 1))
    assert main(tiny("begun", method="supervised")) == 1
    assert "metrics.jsonl is not what it was when the checkpoint was taken" in capsys.readouterr().err


def test_a_whole_checkpoint_of_another_format_is_not_passed_over(two: Path) -> None:
    plant(two, b"whatever a later version writes", format=2)
    with pytest.raises(CheckpointError, match=r"20\.pt has format 2, this trainer reads 1: .*remove it and"):
        load_latest(two)


def test_a_whole_checkpoint_of_something_else_is_refused(two: Path) -> None:
    torch.save([1, 2], two / "list.pt")
    plant(two, (two / "list.pt").read_bytes())
    with pytest.raises(CheckpointError, match="holds a list, not the state of a run"):
        load_latest(two)


def test_lost_records_are_refused(two: Path) -> None:
    for record in two.glob("*.json"):
        record.unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints without their records .*05.pt, .*10.pt\): restore"):
        remove_leftovers(two)
    assert len(list(two.glob("*.pt"))) == 2


def test_a_damaged_later_checkpoint_does_not_take_the_place_of_a_whole_one(two: Path) -> None:
    (two / "step-00000010.pt").write_bytes(b"")
    assert load_latest(two)["step"] == 5  # type: ignore[index]
    for step in (6, 7):
        save_checkpoint(two, step, state(step))
    assert sorted(path.name for path in two.glob("*.pt")) == ["step-00000006.pt", "step-00000007.pt"]


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1}, {"step": 10**30}, {"step": None}, {"evaluations": torch.zeros(2, 2)}, {"evaluations": ["x"]},
        {"method": 3}, {"average": []}, {"optimizer": None}, {"meter": [1]}, {"processes": {"rng": torch.zeros(3)}},
        {"metrics_bytes": -1}, {"metrics_bytes": "x"}, {"metrics_sha256": 5}, {"seconds": None},
        "step", "method", "average", "processes", "metrics_bytes", "seconds",
    ],
    ids=str,
)  # fmt: skip
def test_a_state_with_a_foreign_item_or_without_one_is_refused(
    tiny: MakeConfig, begun: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any] | str
) -> None:
    """Items of the state by what stands there instead, or the name of one that is missing."""
    loaded = load_latest(begun / "checkpoints") or {}
    changed = {**loaded, **changes} if isinstance(changes, dict) else {k: v for k, v in loaded.items() if k != changes}
    save_checkpoint(begun / "checkpoints", 6, changed)
    assert main(tiny("begun", method="supervised")) == 1
    assert "error: the checkpoint does not fit this run" in capsys.readouterr().err


def test_workers_that_outlive_a_killed_trainer_do_not_hold_its_directory(tmp_path: Path) -> None:
    with exclusive(tmp_path):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        worker.start()
    with exclusive(tmp_path):
        assert worker.is_alive()
    worker.kill()
    worker.join()


@pytest.mark.parametrize("become", ["a pipe", "a folder", "bytes", "endless"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_to_start_from_that_are_no_weights_are_refused(
    tiny: MakeConfig, tmp_path: Path, become: str, suffix: str
) -> None:
    path = tmp_path / f"start{suffix}"
    path.touch()
    BECOME[become](path)
    with pytest.raises((OptionError, CheckpointError), match=rf"start{suffix} (cannot be read|is neither|is refused)"):
        run(tiny(init_from=str(path), method="supervised"))


@pytest.mark.parametrize("state", [{}, {"average": []}, {"average": {"model": {"weight": "text"}}}])
def test_a_foreign_checkpoint_to_start_from_is_refused(tiny: MakeConfig, tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save(state, tmp_path / "start.pt")
    with pytest.raises(OptionError, match="is no checkpoint of a trainer and no state_dict: it has no weights"):
        run(tiny(init_from=str(tmp_path / "start.pt"), method="supervised"))


@pytest.mark.parametrize("become", ["a pipe", "endless", "a loop", "bytes", "shorter"])
def test_an_image_that_cannot_be_read_is_named(photo_folder: MakeFolder, become: str) -> None:
    root = photo_folder(train={"a": 2, "b": 1}, test={"a": 1, "b": 1})
    BECOME[become](root / "train" / "a" / "001.png")
    with pytest.raises(DatasetError, match=r"train.a.001\.png cannot be read as an image .*replace or remove it"):
        load_images(Config(dataset="folder", data_dir=str(root)))


def test_a_class_that_is_a_loop_is_no_class(photo_folder: MakeFolder) -> None:
    root = photo_folder(train={"a": 1, "b": 1}, test={"a": 1, "b": 1})
    (root / "train" / "c").symlink_to(root / "train" / "c")
    assert list_folder(root).classes == ["a", "b"]
