from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.runs import MakeConfig
from trainer.cli import parse_config
from trainer.config import Config, preset_config
from trainer.files import read_json
from trainer.training import run


def parse(*arguments: str) -> Config:
    return parse_config(arguments, program="fixmatch_cifar.py", description="Trains.")


WriteFile = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path) -> WriteFile:
    """Writes options, or a text that is to hold them, into a file."""

    def write(content: Any = None, name: str = "options.json", **options: Any) -> str:
        if name.endswith("yaml"):
            pytest.importorskip("yaml")
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content or options), encoding="utf-8")
        return str(path)

    return write


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(file: WriteFile) -> None:
    path = file(preset="demo", labels=60, lr=1, threshold=None, amp="bf16")
    expected = dataclasses.replace(
        preset_config("demo"), labels=60, lr=1.0, amp="bf16", batch_size=5, seed=3, config=path
    )
    assert parse("--seed", "3", "--config", path, "--batch-size", "5") == expected
    assert parse(f"--config={path}", "--lr", "0.5", "--amp", "off").lr == 0.5
    assert parse("--preset", "demo", "--config", path).labels == 60


def test_a_file_without_a_preset_takes_that_of_the_command_line(file: WriteFile) -> None:
    path = file(labels=250)
    assert parse("--config", path) == dataclasses.replace(preset_config("paper"), labels=250, config=path)
    config = parse("--config", path, "--preset", "fixmatch")
    assert (config.preset, config.labels, config.ggcr_weight) == ("fixmatch", 250, 0.0)


def test_the_config_of_a_run_repeats_it(tiny: MakeConfig) -> None:
    first = tiny("first", steps=4, seed=5)
    assert run(first) == 0
    stored = Path(str(first.output)) / "config.json"
    again = parse("--config", str(stored), "--output", f"{first.output}-again")
    assert again.output == f"{first.output}-again"
    assert parse("--config", str(stored)).output is None  # a repetition is a run of its own
    assert run(again) == 0
    options = [read_json(Path(str(config.output)) / "config.json")["options"] for config in (first, again)]
    for found in options:
        del found["output"], found["config"]
    assert options[0] == options[1]
    for name in ("metrics.jsonl", "split.json", "model.safetensors"):
        assert (stored.parent / name).read_bytes() == (Path(str(again.output)) / name).read_bytes()


WRONG_JSON = [
    ({"label": 40}, "'label' is no option; did you mean 'labels'?"),
    ({"ggcr-weight": 0.1}, "'ggcr-weight' is no option; did you mean 'ggcr_weight'?"),
    ({"colour": "red"}, "'colour' is no option; the trainer's --help lists what there is"),
    ({"labels": "40"}, "'labels' is \"40\"; expected an integer"),
    ({"labels": 40.5}, "'labels' is 40.5; expected an integer"),
    ({"labels": True}, "'labels' is true; expected an integer"),
    ({"ggcr_weight": None}, "'ggcr_weight' is null; expected a number"),
    ({"threshold": "high"}, "'threshold' is \"high\"; expected a number or null"),
    ({"channels_last": 1}, "'channels_last' is 1; expected true or false"),
    ({"amp": "fp8"}, '\'amp\' is "fp8"; expected "off" or "bf16" or "fp16"'),
    ({"preset": "best"}, '\'preset\' is "best"; expected "paper" or'),
    ({"config": "other.json"}, "'config' in a file would be another file; put the options into one"),
    ({"options": {"label": 40}}, "'label' is no option; did you mean 'labels'?"),
    ("{", "cannot be read (Expecting property name"),
    ("[1]", 'holds a list: write an object of options, such as {"labels": 250}'),
    ('{"labels": 40, "labels": 50}', "'labels' is there twice: leave one of them"),
]
WRONG_YAML = [
    ("labels: [1", "no YAML: while parsing a flow sequence"),
    ("1: 2", "1 is no name of an option"),
    ("? [1, 2]\n: 3", "[1, 2] is no name of an option"),
    ("steps: 2020-01-01", "'steps' is \"2020-01-01\"; expected an integer"),
    ("!!python/object/apply:os.mkdir [pwned]", "could not determine a constructor"),
    ("a: &a [*a]", "recursive"),
    ("steps: 1\n---\nsteps: 2", "expected a single document"),
    ("labels: 250\nlabels: 40\n", "'labels' is there twice"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [*(("options.json", *row) for row in WRONG_JSON), *(("options.yaml", *row) for row in WRONG_YAML)],
)
def test_a_wrong_file_is_refused_by_name_on_one_line(
    file: WriteFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: Any, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = file(content, name)
    with pytest.raises(SystemExit, match="2"):
        parse("--config", path)
    said = capsys.readouterr().err
    assert said.startswith(f"error: --config {path}")
    assert message in said
    assert said.count("\n") == 1
    assert [str(each) for each in tmp_path.iterdir()] == [path], "no file runs anything"


@pytest.mark.parametrize(
    ("name", "content"),
    [("options.json", '\ufeff{"lr": 0.001}'), ("options.yaml", "\ufefflr: 0.001"), ("options.yaml", "lr: 1e-3")],
    ids=["JSON of Windows", "YAML of Windows", "a number that is a text by the letter of YAML 1.1"],
)
def test_a_file_as_people_write_it(file: WriteFile, name: str, content: str) -> None:
    assert parse("--config", file(content, name)).lr == 0.001


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "none.json"], "none.json cannot be read"),
        (["--preset", "fixmatch", "--config", "demo.json"], "--preset fixmatch, but --config "),
    ],
)
def test_a_file_that_is_absent_or_contradicted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo.json").write_text('{"preset": "demo"}')
    with pytest.raises(SystemExit, match="2"):
        parse(*words)
    assert message in capsys.readouterr().err
