"""Whatever a user can cause ends on one line that begins with `error:`, in every program that the trainers bring."""

from __future__ import annotations

import errno
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import demo
import evaluate
import predict
import report
import reproduce
from support.pictures import draw_folder
from support.runs import MakeConfig, trained
from trainer.cli import parse_config
from trainer.errors import refuse
from trainer.launch import TRACEBACK, guarded
from trainer.training import main, run
from trainer.weights import export_weights, load_model

PROGRAMS = {"predict": predict.main, "evaluate": evaluate.main, "report": report.main, "reproduce": reproduce.main}
PROGRAMS |= {"demo": demo.main, "fixmatch_cifar": lambda words: main(parse_config(words))}


@pytest.fixture(scope="module")
def room(tiny_at: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, images in class folders, networks of a user's own, and files that are none."""
    room = tmp_path_factory.mktemp("room")
    parts = {part: dict.fromkeys(("ant", "bee"), count) for part, count in (("train", 4), ("test", 2))}
    draw_folder(room / "photos", parts)
    assert run(tiny_at(room / "run", dataset="folder", data_dir=str(room / "photos"), labels=8)) == 0
    (room / "empty" / "like.png").mkdir(parents=True)
    (room / "text.txt").write_text("text")
    (room / "user_nets.py").write_text(NETWORKS)
    torch.save({"a": 1}, room / "foreign.pt")
    return room


@pytest.fixture
def here(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    shutil.copytree(room, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    monkeypatch.syspath_prepend(str(tmp_path / "room"))
    monkeypatch.delitem(sys.modules, "user_nets", raising=False)
    return tmp_path / "room"


def said(capsys: pytest.CaptureFixture[str], program: str, words: str) -> tuple[int, str]:
    """Status and last line of a program; there is a single line that begins with `error:`, and no traceback."""
    try:
        status = PROGRAMS[program](words.split())
    except SystemExit as end:
        status = end.code
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "".join(lines)
    assert [line.startswith("error: ") for line in lines if "error: " in line] == [True]
    return status, lines[-1]


@pytest.mark.parametrize(
    ("program", "words", "status", "message"),
    [
        ("predict", "run photos/test --device warp", 2, "--device 'warp' is not usable here"),
        ("evaluate", "run photos/test --device meta", 2, "--device 'meta' is not usable here"),
        ("evaluate", "run photos/test --device cuda:99", 2, "--device 'cuda:99' is not usable here"),
        ("predict", "run photos/test --batch-size 0", 2, "must be a whole number above 0; found 0"),
        ("predict", "run photos/test --top some", 2, "must be a whole number above 0; found some"),
        ("predict", "run photos/test --nonsense", 2, "unrecognized arguments: --nonsense"),
        ("predict", "run", 2, "the following arguments are required: IMAGE"),
        ("predict", "absent photos/test", 1, "absent is not the export of a run"),
        ("predict", "foreign.pt photos/test", 1, "foreign.pt is not the export of a run (KeyError: 'options')"),
        ("predict", "text.txt photos/test", 1, "text.txt is not the export of a run"),
        ("predict", "run empty", 1, "no image is in empty"),
        ("predict", "run /dev/zero", 1, "/dev/zero cannot be read as an image (it is not a regular file)"),
        ("evaluate", "run empty", 1, "empty holds like.png: the model knows the classes ant, bee"),
        ("evaluate", "run text.txt", 1, "text.txt is not a directory"),
        ("evaluate", "run photos/test --output empty", 2, "--output empty: the name must end in one of"),
        ("evaluate", "run photos/test --output absent/x.png", 1, "No such file or directory: 'absent/x.png.tmp'"),
        ("report", "", 2, "the following arguments are required: RUN"),
        ("report", "photos", 1, "photos is not the directory of a run"),
        ("report", "run --output text.txt/page.html", 1, "File exists: 'text.txt'"),
        ("reproduce", "--budget none", 2, "invalid choice: 'none'"),
        ("reproduce", "--output text.txt --budget smoke", 1, "File exists: 'text.txt'"),
        ("demo", "--seeds 0", 2, "must be a whole number above 0; found 0"),
        ("demo", "--output text.txt --steps 2", 2, "--output text.txt/supervised-seed0 cannot be used"),
        ("fixmatch_cifar", "--epoch 3", 2, "--epoch is no option; this trainer counts steps"),
        ("fixmatch_cifar", "--lr inf", 2, "--lr must be above 0; found inf"),
        ("fixmatch_cifar", "--preset demo --output /proc/run", 2, "--output /proc/run cannot be used"),
    ],
)  # fmt: skip
def test_programs_refuse_on_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], program: str, words: str, status: int, message: str
) -> None:
    found, line = said(capsys, program, words)
    assert message in line
    assert found == status


NETWORKS = """
from torch import nn
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.other, self.last = nn.Linear(192, 8), nn.Linear(192, 8), nn.Linear(8, classes)
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        return self.last(self.first(x.flatten(1)) + self.other(x.flatten(1)))
class Late(Net):
    def forward(self, x):
        if self.calls > 8: raise ZeroDivisionError("a bug of mine")
        return super().forward(x)
class Trains(Net):
    def forward(self, x): return [super().forward(x)] if self.training else super().forward(x)
class Remembers(Net):
    def get_extra_state(self): return {"calls": self.calls}
    def set_extra_state(self, state): pass
def tied(classes):
    net = Net(classes)
    net.other.weight = net.first.weight
    return net
"""


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("Late", "error: step 8: --arch user_nets:Late failed (ZeroDivisionError: a bug of mine, in "),
        ("Trains", "--arch user_nets:Trains returns a list for 2 images in train mode: expected logits (2, 2)"),
        ("Remembers", "_extra_state in its state_dict is no tensor, and cannot be exported"),
    ],
)
def test_a_network_of_ones_own_that_fails(
    here: Path, tiny: MakeConfig, capsys: pytest.CaptureFixture[str], arch: str, message: str
) -> None:
    config = tiny(arch=f"user_nets:{arch}", dataset="folder", data_dir="photos", labels=8, checkpoint_every=2)
    assert main(config) in (1, 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert arch != "Late" or "user_nets.py, line 13). Nothing was updated" in line


def test_tied_weights_are_exported(here: Path, tiny: MakeConfig) -> None:
    config = tiny(arch="user_nets:tied", dataset="folder", data_dir="photos", labels=8)
    model, _ = load_model(trained(config))
    assert model.first.weight is model.other.weight


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE in the environment is 'two': expected a whole number from 1"),
        ("WORLD_SIZE", "0", "WORLD_SIZE in the environment is '0'"),
        ("RANK", "2", "RANK in the environment is '2': expected a whole number from 0 to 1"),
        ("LOCAL_RANK", "x", "LOCAL_RANK in the environment is 'x'"),
        ("LOCAL_WORLD_SIZE", "", "LOCAL_WORLD_SIZE in the environment is ''"),
        ("MASTER_PORT", "http", "MASTER_PORT in the environment is 'http'"),
    ],
)
def test_variables_of_torchrun_that_are_no_numbers(
    tiny: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    message: str,
) -> None:
    whole = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for key, text in (whole | {name: value}).items():
        monkeypatch.setenv(key, text)
    assert main(tiny()) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("key", "value"),
    [("std", [0, 1, 1]), ("std", [1]), ("mean", ["x", 0, 0]), ("classes", None), ("image_size", [0, 8]), ("arch", 3)],
)
def test_an_export_that_cannot_be_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    model, about = load_model("run")
    export_weights(Path("forged.safetensors"), model, about | {key: value})
    status, line = said(capsys, "predict", "forged.safetensors photos/test")
    assert (status, "forged.safetensors is not the export of a run" in line) == (1, True)


def test_the_times_of_a_grid_that_are_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("garbage\n", '{"a": 1}\n'):
        Path("journal.jsonl").write_text(text)
        line = said(capsys, "reproduce", "--output . --budget smoke --table curves --list")[1]
        assert "journal.jsonl cannot be read" in line


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    assert predict.main(["run", "photos/test"]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_what_nobody_foresaw_has_its_place_and_on_request_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def action() -> int:
        return json.loads("[")

    assert guarded(action) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: JSONDecodeError: Expecting value: line 1 column 2 (char 1), in ")
    assert f"{TRACEBACK}=1 in the environment shows" in line
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(json.JSONDecodeError, match="Expecting value"):
        guarded(action)


def test_one_line_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    assert refuse(ValueError("\x1b[1mfirst\x1b[0m\n  second\n")) == 1
    assert capsys.readouterr().err == "error: first second\n"
