"""Folders, lists, options and weights as people have them: taken as they are meant, or said, or refused on one line."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import evaluate
import predict
from support.pictures import MakeFolder
from support.runs import MakeConfig, trained
from trainer import loggers
from trainer.cli import parse_config
from trainer.datasets import load_images
from trainer.errors import CheckpointError, DatasetError, OptionError
from trainer.files import json_lines, read_json
from trainer.folder import list_folder
from trainer.images import fit
from trainer.runlog import append_line
from trainer.split import read_list
from trainer.training import main, run
from trainer.weights import load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(photo_folder: MakeFolder) -> Path:
    """Six labeled images of each of two classes, four test images, four without a label."""
    return photo_folder(train={"ant": 6, "bee": 6}, test={"ant": 2, "bee": 2}, unlabeled={"": 4})


@pytest.fixture
def mine(root: Path, tiny: MakeConfig) -> MakeConfig:
    """Options of a run on them."""
    places: dict[str, Any] = {"dataset": "folder", "data_dir": str(root), "labels": "all", "image_size": 8}
    return lambda name="run", **changes: tiny(name, **{**places, "strong": "weak", "method": "supervised", **changes})


# -- images that are there twice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("feed", ["memory", "stream"])
def test_test_and_held_out_images_that_are_trained_on_are_said(
    root: Path, mine: MakeConfig, feed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(mine("clean", feed=feed, hold_out=0.2, steps=1)) == 0
    assert "trained on, too" not in capsys.readouterr().err
    (root / "unlabeled" / "all").symlink_to(root)  # in a pile of everything lie all images
    shutil.copy(root / "train" / "ant" / "000.png", root / "train" / "bee" / "x.png")
    assert run(mine(feed=feed, hold_out=0.2, steps=1)) == 0
    said = capsys.readouterr().err
    assert "note: 4 test images are trained on, too, with or without a label (test/ant/000.png is " in said
    assert "note: 2 held-out images are trained on, too" in said
    assert "note: 1 images are in several classes (train/ant/000.png is train/bee/x.png): remove all but one" in said


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unlabeled", "test", "val"])
@pytest.mark.parametrize("broken", [True, False])
def test_a_part_that_is_no_folder_is_refused(root: Path, part: str, broken: bool) -> None:
    shutil.rmtree(root / part, ignore_errors=True)
    (root / part).symlink_to("nowhere") if broken else (root / part).write_text("")
    with pytest.raises(DatasetError, match=rf"{part} is a file or a broken link: make it a directory, or remove it"):
        list_folder(root)


@pytest.mark.parametrize("part", ["", "train", "unlabeled"])
def test_a_link_to_itself_is_refused(
    root: Path, mine: MakeConfig, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / part)
    (root / part).symlink_to(root / part)
    assert main(mine(output=None)) == main(mine()) == 1
    remedy = "make it a directory" if part == "unlabeled" else "expected --data-dir to hold"
    assert capsys.readouterr().err.count(remedy) == 2


def test_what_a_system_puts_there_is_hidden_and_what_is_not_used_is_said(root: Path) -> None:
    ant = root / "train" / "ant"
    for thumbnails in (ant / "@eaDir" / "000.png", ant / "__MACOSX", root / "train" / "__MACOSX"):
        thumbnails.mkdir(parents=True)
        shutil.copy(ant / "001.png", thumbnails / "thumbnail.png")
    (ant / "gone").symlink_to("nowhere")
    (root / "train" / "wasp").symlink_to("nowhere")
    for name in ("Ant", "Unlabelled"):
        shutil.copytree(ant, root / ("train" if name == "Ant" else "") / name, symlinks=True)
    shutil.copytree(ant, root / "test" / "Ant", symlinks=True)
    listing = list_folder(root)
    assert listing.train.labels.count(0) == listing.train.labels.count(1) == 6
    assert listing.notes == [
        "not used: Unlabelled beside train/, test/ (or val/) and unlabeled/",
        "2 class folders read 'ant' but for case or spaces",
        "not used: 4 broken links, 7 hidden",
    ]


def test_evaluate_and_predict_read_a_folder_as_the_run_does(
    root: Path, mine: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = root / "test"
    (tmp_path / "more").mkdir()
    shutil.move(test / "bee" / "001.png", tmp_path / "more" / "linked.png")
    (test / "bee" / "link").symlink_to(tmp_path / "more")
    (test / "bee" / ".thumbnails").mkdir()
    shutil.copy(root / "train" / "ant" / "000.png", test / "bee" / ".thumbnails")
    (test / "bee" / "photo.heic").write_text("")
    config = mine()
    last = read_json(trained(config) / "summary.json")["last"]
    capsys.readouterr()
    assert evaluate.main([str(config.output), str(test)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"accuracy {last:.4f}, ")
    assert ": 4 images\n" in said.out
    assert said.err == "note: not used: 1 hidden, 1 of type .heic\n"
    assert predict.main([str(config.output), str(test)]) == 0
    said = capsys.readouterr()
    assert sorted(Path(line.split(",")[0]).name for line in said.out.splitlines()[1:]) == [
        "000.png", "000.png", "001.png", "linked.png",
    ]  # fmt: skip
    assert said.err == "note: not used: 1 hidden, 1 of type .heic\n"
    (test / "bee" / "link").unlink()
    (test / "bee" / "000.png").unlink()
    assert evaluate.main([str(config.output), str(test)]) == 0
    assert "1 class folders without an image" in capsys.readouterr().err


def test_evaluate_refuses_a_class_in_two_unicode_forms(
    photo_folder: MakeFolder, tiny: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photo_folder(train={"caf\u00e9": 2, "b": 2}, test={"cafe\u0301": 2, "b": 2})
    config = tiny(dataset="folder", data_dir=str(root), labels=4, method="supervised", steps=1)
    assert run(config) == 0
    shutil.copytree(root / "test" / "b", root / "test" / "caf\u00e9")
    assert evaluate.main([str(config.output), str(root / "test")]) == 1
    assert "two class folders that both read 'caf\u00e9'" in capsys.readouterr().err


def test_an_image_of_another_size_is_named(
    photo_folder: MakeFolder, tiny: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photo_folder(train={"a": 2, "b": 2}, test={"a": 1, "b": 1}, size=(8, 12))
    config = tiny(dataset="folder", data_dir=str(root), labels=4, method="supervised", steps=1)
    assert run(config) == 0
    Image.new("RGB", (9, 9)).save(root / "test" / "b" / "000.png")
    assert evaluate.main([str(config.output), str(root / "test")]) == 1
    assert "test/b/000.png is 9x9, and the model takes 8x12: resize it" in capsys.readouterr().err


# -- lists of labeled images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["cat", "bom", "crlf", "windows", "absolute"])
def test_lists_as_other_systems_write_them(mine: MakeConfig, tmp_path: Path, root: Path, form: str) -> None:
    names = ["ant/001.png", "bee/002.png"]
    if form == "windows":
        names = ["C:\\photos\\train\\ant\\001.png", "bee\\002.png"]
    if form == "absolute":
        names = [f"{root}/train/{name}" for name in names]
    text = "".join(name + ("\r\n" if form == "crlf" else "\n") for name in names)
    (tmp_path / "list.txt").write_bytes(text.encode("utf-8-sig" if form == "bom" else "utf-8"))
    assert read_list(tmp_path / "list.txt", load_images(mine())).tolist() == [1, 8]


@pytest.mark.parametrize("part", ["test", "val", "unlabeled"])
def test_a_list_that_names_another_part_is_refused(mine: MakeConfig, tmp_path: Path, part: str) -> None:
    (tmp_path / "list.txt").write_text(f"{part}/ant/000.png\nbee/000.png\n")
    with pytest.raises(DatasetError, match=rf"line 1: '{part}/ant/000.png' is no training image in a class folder"):
        read_list(tmp_path / "list.txt", load_images(mine()))


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (3, 4001)])
def test_a_long_strip_is_not_scaled_as_a_whole(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "white")
    image.paste("red", (0, 0, size[0] // 2 - 60, size[1]) if size[0] > 9 else (0, 0, size[0], size[1] // 2 - 60))
    crops: list[tuple[int, ...]] = []
    scaled = Image.Image.resize

    def resize(self: Image.Image, to: tuple[int, int], *rest: Any) -> Image.Image:
        crops.append(to)
        return scaled(self, to, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        found = fit(image, 224, 224)
    assert found.size == (224, 224)
    assert found.getextrema() == ((255, 255),) * 3  # the middle
    assert max(crops[0]) <= 16 * 224


def test_images_of_one_pixel_and_too_many_pixels(mine: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(mine(image_size=1)) == 1
    assert "error: images of one pixel cannot be shifted: give --image-size 2 or more" in capsys.readouterr().err
    assert main(mine(image_size=10**6)) == 1
    assert "Give a smaller --image-size, --batch-size" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("feed", ["memory", "stream"])
def test_a_run_goes_on_when_all_test_images_are_lost(mine: MakeConfig, root: Path, feed: str) -> None:
    config = mine(feed=feed, stop_after_steps=1)
    assert run(config) == 0
    shutil.rmtree(root / "test")
    assert run(dataclasses.replace(config, stop_after_steps=None, skip_damaged=True)) == 0
    assert read_json(Path(str(config.output), "summary.json"))["last"] is None


# -- files of a run ----------------------------------------------------------------------------------------------------


def test_half_a_line_that_a_full_disk_left_does_not_cost_the_run(mine: MakeConfig) -> None:
    config = mine(stop_after_steps=6)
    timing = trained(config) / "timing.jsonl"
    whole = json_lines(timing)
    with open(timing, "a") as file:
        file.write('{"step": 9, "sec')
    append_line(timing, {"step": 9, "seconds": 1.0, "images_per_second": 1.0})
    assert json_lines(timing) == [*whole, {"step": 9, "seconds": 1.0, "images_per_second": 1.0}]


def test_a_left_out_file_is_recorded_once_whatever_its_name(mine: MakeConfig, root: Path) -> None:
    (root / "unlabeled" / "caf\u00e9.png").write_text("")
    config = mine(skip_damaged=True, stop_after_steps=1)
    for _ in range(2):
        assert run(config) == 0
    left = Path(str(config.output), "left_out.jsonl")
    assert [line["file"] for line in json_lines(left)] == ["unlabeled/caf\u00e9.png"]
    left.write_bytes(b"\xff\n")
    assert run(config) == 0


def test_statistics_that_a_checkpoint_does_not_have_are_said(
    mine: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mine(eval_statistics="anew", stop_after_steps=1)
    load_model(trained(config))
    assert "note: of --eval-statistics anew only model.safetensors has" in capsys.readouterr().err
    assert run(dataclasses.replace(config, stop_after_steps=None)) == 0
    capsys.readouterr()
    load_model(str(config.output))
    assert capsys.readouterr().err == ""


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_are_known_by_their_content_and_must_be_floats(mine: MakeConfig, tmp_path: Path) -> None:
    config = mine(steps=1)
    weights = load_model(trained(config))[0].state_dict()
    for name in ("a.ckpt", "a.pth.tar", "a"):
        torch.save({"state_dict": weights}, tmp_path / name)
        assert run(mine(f"from-{name}", init_from=str(tmp_path / name), steps=1)) == 0
    torch.save({name: value.to(torch.int8) for name, value in weights.items()}, tmp_path / "int8.pth")
    with pytest.raises(OptionError, match="is int8 there, of which floats cannot be made"):
        run(mine("int8", init_from=str(tmp_path / "int8.pth")))
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"if a torch before 1\.6 wrote it, load it and save it again"):
        run(mine("old", init_from=str(tmp_path / "old.pth")))


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--check-images", "check_images", True),
        ("--no-check-images", "check_images", False),
        ("--check-images None", "check_images", None),
        ("--joint_forward False", "joint_forward", False),
        ("--flip False", "flip", False),
        ("--flip True", "flip", True),
        ("--no-flip --seed 3", "flip", False),
        ("--skip-damaged --seed 3", "skip_damaged", True),
    ],
)
def test_switches_are_written_in_every_way(words: str, name: str, value: bool | None) -> None:
    assert getattr(parse_config(words.split()), name) is value


def test_class_names_do_not_depend_on_the_locale(photo_folder: MakeFolder) -> None:
    root = photo_folder(train={"caf\u00e9": 1, "b": 1})
    code = f"import pathlib, trainer.folder as f; print(ascii(f.list_folder(pathlib.Path({str(root)!r})).classes))"
    plain = {"PYTHONPATH": str(ROOT / "examples"), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, timeout=120)
    assert done.stdout == "['b', 'caf\\xe9']\n", done.stderr


@pytest.mark.parametrize("package", ["wandb", "mlflow", "tensorboard"])
def test_a_logger_that_is_absent_is_refused_before_anything_is_read(
    mine: MakeConfig, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    config = mine(data_dir="absent", **{package: True})
    with pytest.raises(OptionError, match=f"--{package} needs the {package} package: pip install {package}"):
        run(config)
    assert not Path(str(config.output)).exists()


def test_mlflow_takes_any_class_name(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, float] = {}
    own = loggers.Loggers()
    own.mlflow = SimpleNamespace(log_metrics=lambda numbers, step: logged.update(numbers))
    own.write("eval", 1, {"recall/it's": 0.5, 'recall/it"s': 0.25, "recall/caf\u00e9 (a)": 1.0, "test_loss": 2.0})
    assert logged == {
        "recall/it_27_s": 0.5,
        "recall/it_22_s": 0.25,
        "recall/caf\u00e9 _28_a_29_": 1.0,
        "test_loss": 2.0,
    }
