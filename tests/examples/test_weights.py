from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.files
from support.runs import MakeConfig
from trainer.checkpoint import load_latest
from trainer.config import Config, resolve
from trainer.datasets import load_images
from trainer.errors import CheckpointError, OptionError, ResumeError
from trainer.loader import ToModel
from trainer.models import build_model
from trainer.step import Trainer
from trainer.training import run
from trainer.weights import export_weights, load_model, read_start


@pytest.fixture(scope="module")
def source(tiny_at: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose weights the tests use."""
    folder = tmp_path_factory.mktemp("source") / "run"
    assert run(tiny_at(folder, channels_last=True)) == 0
    return folder


def averaged(folder: Path) -> dict[str, torch.Tensor]:
    state = load_latest(folder / "checkpoints")
    assert state is not None
    return dict(state["average"]["model"])


def header(path: Path) -> dict[str, Any]:
    """By the format's definition: eight bytes of length, then JSON."""
    content = path.read_bytes()
    return dict(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]))


def test_a_run_exports_its_averaged_model_and_says_how_to_use_it(source: Path) -> None:
    model, about = load_model(source / "model.safetensors")
    expected, found = averaged(source), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not model.training
    images = load_images(resolve(Config(dataset="digits")))
    pixels = images.train_x.double().flatten(0, 2) / 255
    assert about["mean"] == pytest.approx(pixels.mean(0).tolist())
    assert about["std"] == pytest.approx(pixels.std(0, correction=0).tolist())
    assert (about["classes"], about["image_size"], about["arch"]) == ([str(k) for k in range(10)], [8, 8], "wrn-10-1")
    assert (about["steps"], about["labels"], about["method"]) == (12, 20, "fixmatch+ggcr")
    stored = header(source / "model.safetensors")
    assert stored["__metadata__"].keys() == {"about"}
    assert json.loads(stored["__metadata__"]["about"]) == about
    assert stored["head.weight"]["shape"] == [10, 64]


def test_the_exported_model_classifies_as_the_run_did(source: Path) -> None:
    model, about = load_model(source / "model.safetensors")
    images = load_images(resolve(Config(dataset="digits")))
    to_model = ToModel(about["mean"], about["std"], torch.device("cpu"), channels_last=False)
    right = (model(to_model.images(images.test_x)).argmax(1) == images.test_y).float().mean().item()
    records = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
    assert right == pytest.approx(records[-1]["test_accuracy"], abs=1 / len(images.test_y))


def test_an_export_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(trainer.files.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        export_weights(path, build_model("wrn-10-1", 3, momentum=0.1), {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("name", ["config.json", "missing.safetensors"])
def test_what_is_no_export_is_refused(source: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is not the export of a run .*give a run's directory"):
        load_model(source / name)


def begun(config: Config, part: str = "model") -> Trainer:
    """A trainer at its first step."""
    config, start = read_start(dataclasses.replace(resolve(config), init_part=part))
    to_model = ToModel([0.0] * 3, [1.0] * 3, torch.device("cpu"), channels_last=False)
    return Trainer.fresh(config, 10, to_model, 100, start)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoints/step-00000012.pt"])
def test_a_run_starts_from_averaged_weights(source: Path, tiny: MakeConfig, name: str) -> None:
    trainer, expected = begun(tiny(init_from=str(source / name), seed=7)), averaged(source)
    for model in (trainer.model, trainer.average.model, trainer.method.method.model):
        found = model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_mean_teacher_starts_from_them_too(source: Path, tiny: MakeConfig) -> None:
    config = tiny(init_from=str(source / "model.safetensors"), method="meanteacher", threshold=None)
    expected = averaged(source)["encoder.0.weight"]
    copies = [value for name, value in begun(config).method.state_dict().items() if name.endswith("encoder.0.weight")]
    assert len(copies) >= 2
    assert all(torch.equal(value, expected) for value in copies)


def test_the_encoder_alone_leaves_the_head_as_it_was_drawn(source: Path, tiny: MakeConfig) -> None:
    trainer = begun(tiny(init_from=str(source / "model.safetensors"), seed=7), part="encoder")
    fresh, expected = begun(tiny(seed=7)).model.state_dict(), averaged(source)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, fresh[name] if name.startswith("head.") else expected[name])


def test_the_file_is_part_of_the_run(source: Path, tiny: MakeConfig, tmp_path: Path) -> None:
    copy = tmp_path / "start.safetensors"
    copy.write_bytes((source / "model.safetensors").read_bytes())
    config = tiny("warm", init_from=str(copy), steps=4, stop_after_steps=2)
    assert run(config) == 0
    moved = dataclasses.replace(config, init_from=str(source / "model.safetensors"))
    assert run(moved) == 0  # the same content elsewhere
    export_weights(copy, build_model("wrn-10-1", 10, momentum=0.1), {})
    with pytest.raises(ResumeError, match=r"--init-sha256: [0-9a-f]{64} there, [0-9a-f]{64} now"):
        run(config)
    with pytest.raises(ResumeError, match=r"--init-sha256: [0-9a-f]{64} there, None now"):
        run(dataclasses.replace(config, init_from=None))
    with pytest.raises(OptionError, match=r"start.safetensors has the SHA-256 [0-9a-f]{64}, not --init-sha256 1234"):
        run(tiny("other", init_from=str(copy), init_sha256="1234"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_part": "encoder"}, "--init-part has nothing to act on: give --init-from, too"),
        ({"init_sha256": "0"}, "--init-sha256 has nothing to act on: give --init-from, too"),
        ({"init_from": "none.pt"}, r"--init-from none.pt cannot be read .*give a run, a model.safetensors or"),
        ({"init_from": "SOURCE/config.json"}, "is neither a checkpoint .* nor a safetensors file"),
        (
            {"init_from": "SOURCE/model.safetensors", "arch": "wrn-16-1"},
            r"does not fit --arch wrn-16-1: .*give the --arch",
        ),
        (
            {"init_from": "three.safetensors"},
            r"head.weight is \[3, 64\] there and \[10, 64\] here; .*--init-part encoder",
        ),
        ({"init_from": "nan.safetensors"}, "nan.safetensors: head.bias holds values that are not finite"),
        ({"init_from": "other.pt"}, "other.pt is no checkpoint of a trainer and no state_dict"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    source: Path,
    tiny: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    export_weights(Path("three.safetensors"), build_model("wrn-10-1", 3, momentum=0.1), {})
    spoilt = build_model("wrn-10-1", 10, momentum=0.1)
    torch.nn.init.constant_(spoilt.head.bias, float("nan"))
    export_weights(Path("nan.safetensors"), spoilt, {})
    torch.save({"model": {}}, "other.pt")
    changes = {key: value.replace("SOURCE", str(source)) for key, value in changes.items()}
    config = tiny(**changes)
    with pytest.raises(OptionError, match=message):
        run(config)
    assert not Path(str(config.output)).exists()


def test_a_pickle_that_runs_code_is_refused(tiny: MakeConfig, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    torch.save(Evil(), tmp_path / "step-00000001.pt")
    with pytest.raises(CheckpointError, match=r"is refused: it holds something other than tensors and plain values"):
        run(tiny(init_from=str(tmp_path / "step-00000001.pt")))
    assert not (tmp_path / "executed").exists()
