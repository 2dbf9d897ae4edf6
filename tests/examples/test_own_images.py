"""What people bring: unlabeled piles, sub-folders, deep, turned and damaged images, and networks of their own."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import predict
from support.pictures import MakeFolder
from support.runs import MakeConfig, differing, trained
from trainer.config import resolve
from trainer.datasets import load_images
from trainer.errors import CheckpointError, DatasetError, OptionError, ResumeError
from trainer.files import json_lines, read_json, write_json
from trainer.folder import list_folder
from trainer.images import read_image
from trainer.models import build_model
from trainer.split import choose_labeled
from trainer.training import main, run
from trainer.weights import load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mine(photo_folder: MakeFolder, tiny: MakeConfig) -> MakeConfig:
    """Options of a run on 4 + 8 labeled and 10 unlabeled photographs, without a test part."""
    root = photo_folder(train={"ant": 4, "bee": 8}, unlabeled={"": 6, "2023/may": 4})
    places: dict[str, Any] = {"dataset": "folder", "data_dir": str(root), "labels": None}
    return lambda name="run", **changes: tiny(name, **{**places, **changes})


# -- folders and labels ------------------------------------------------------------------------------------------------


def test_unlabeled_images_are_trained_on_and_the_labeled_ones_are_taken_as_they_are(mine: MakeConfig) -> None:
    config = resolve(mine())
    data = load_images(config)
    assert (config.labels, len(data.train_y), int((data.train_y < 0).sum()), len(data.test_y)) == ("all", 22, 10, 0)
    assert torch.bincount(data.train_y[choose_labeled(data, config).labeled]).tolist() == [4, 8]
    lines = json_lines(trained(config) / "metrics.jsonl")
    assert {line["kind"] for line in lines} == {"train"}
    summary = read_json(Path(str(config.output), "summary.json"))
    assert (summary["labels"], summary["last"], summary["protocol"]) == (12, None, "no test images")


def test_sub_folders_count_and_hidden_and_foreign_files_are_said(
    mine: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mine(steps=1)
    ant = Path(config.data_dir) / "train" / "ant"
    (ant / "deep" / "er").mkdir(parents=True)
    (ant / "000.png").rename(ant / "deep" / "er" / "000.PNG")
    (ant / "deep" / "circle").symlink_to(ant)
    (ant / "001.png").rename(ant / "deep" / "001.png")
    (ant / "001.png").mkdir()  # folders named like images
    (ant / "002.jpg").mkdir()
    (ant / "002.png").rename(ant / "002.jpg" / "002.png")
    for name in (".hidden.png", "notes.txt", "Thumbs.db", "photo.heic"):
        (ant / name).write_bytes(b"x")
    listing = list_folder(Path(config.data_dir))
    assert sum(label == 0 for label in listing.train.labels) == 4
    assert run(config) == 0
    said = capsys.readouterr().err
    found = "1 empty folders named like an image, 1 hidden, 1 links to a folder above, 1 of type .db, 1 of type .heic, "
    assert f"note: not used: {found}1 of type .txt" in said


def test_the_same_class_in_two_unicode_forms(photo_folder: MakeFolder) -> None:
    root = photo_folder(train={"caf\u00e9": 1, "b": 1}, test={"cafe\u0301": 1, "b": 1})
    assert list_folder(root).classes == ["b", "caf\u00e9"]
    (root / "train" / "cafe\u0301").mkdir()
    with pytest.raises(DatasetError, match="two class folders that both read 'caf\u00e9'"):
        list_folder(root)


def test_class_names_in_any_script_but_of_one_line(photo_folder: MakeFolder) -> None:
    names = {
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645": 1,
        "\u732b": 1,
        "a\u00a0b": 1,
    }  # joiners and spaces, too
    assert list_folder(photo_folder(train=names, test=names)).classes == sorted(names)
    with pytest.raises(DatasetError, match=r"class folder 'cat\\ndog', with a line break or the like: rename it"):
        list_folder(photo_folder(train={"cat\ndog": 1, "b": 1}, test={}))


def test_held_out_images_choose_the_best_and_are_not_trained_on(mine: MakeConfig) -> None:
    config = resolve(mine(hold_out=0.25))
    data = load_images(config)
    split = choose_labeled(data, config)
    assert torch.bincount(data.train_y[split.held_out]).tolist() == [1, 2]
    assert torch.bincount(data.train_y[split.labeled]).tolist() == [3, 6]
    summary = read_json(trained(config) / "summary.json")
    assert "best is chosen on held-out training images" in summary["protocol"]
    assert 0 <= summary["best"] <= 1
    with pytest.raises(OptionError, match=r"--hold-out 0.9 takes 4 of the 4 labeled images of class 'ant'"):
        choose_labeled(data, dataclasses.replace(config, hold_out=0.9))


def test_the_whole_of_split_json_is_checked(mine: MakeConfig) -> None:
    config = mine(stop_after_steps=1)
    path = trained(config) / "split.json"
    stored = read_json(path)
    for key, value in (("labeled", [1]), ("classes", ["bee", "ant"]), ("held_out", [0]), ("labeled_files", [])):
        write_json(path, stored | {key: value})
        with pytest.raises(ResumeError, match=f"split.json: the entry '{key}' differs"):
            run(config)
    for key, value in (("mean", [0.5, *stored["mean"][1:]]), ("a_key_of_ones_own", 1)):
        write_json(path, stored | {key: value})
        with pytest.raises(ResumeError, match=f"split.json: the entry '{key}' differs"):
            run(config)
    # With an image lost, today's statistics are not those of the run: the stored ones hold, if they can be any.
    (Path(config.data_dir) / "unlabeled" / "000.png").unlink()
    for value in ([1.0], [0.0, 1.0, 1.0], ["x", 1.0, 1.0], [float("nan"), 1.0, 1.0]):
        path.write_text(json.dumps(stored | {"std": value}))
        with pytest.raises(ResumeError, match=r"split.json: mean or std is damaged"):
            run(dataclasses.replace(config, skip_damaged=True))


# -- images ------------------------------------------------------------------------------------------------------------

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
WIDE = np.repeat(GREY[..., None], 3, 2)
DEEP = GREY.astype(np.uint16) * 257


def _turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(WIDE).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def _palette(path: Path) -> None:
    Image.fromarray(GREY).convert("P").save(path)


def _clear(path: Path) -> None:
    image = np.dstack([WIDE, np.full((8, 8), 255, np.uint8)])
    image[0, 0] = (9, 9, 9, 0)
    Image.fromarray(image).save(path)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("16.png", lambda path: Image.fromarray(DEEP).save(path)),
        ("16.tif", lambda path: Image.fromarray(DEEP).save(path)),
        ("16.pgm", lambda path: path.write_bytes(b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes())),
        ("turned.png", _turned),
        ("turned.tif", _turned),
        ("palette.png", _palette),
        ("cmyk.tif", lambda path: Image.fromarray(WIDE).convert("CMYK").save(path)),
        ("clear.png", _clear),
    ],
)
def test_every_depth_mode_and_orientation_comes_out_right(
    tmp_path: Path, name: str, save: Callable[[Path], object]
) -> None:
    path = tmp_path / name
    save(path)
    expected = WIDE.copy()
    if name == "clear.png":
        expected[0, 0] = 255
    assert np.array_equal(np.asarray(read_image(path)), expected)


def test_channels_of_16_bits_one_after_another_are_refused(tmp_path: Path) -> None:
    """Pillow reads every other byte of them; one that libtiff decodes is right."""
    tags = [(256, 4, 8), (257, 4, 8), (258, 3, 3, 134), (259, 3, 1), (262, 3, 2), (273, 4, 3, 140), (277, 3, 3),
            (278, 4, 8), (279, 4, 3, 152), (284, 3, 2)]  # fmt: skip
    rows = [(tag, kind, *(rest if len(rest) == 2 else (1, *rest))) for tag, kind, *rest in tags]
    directory = struct.pack("<H", len(rows)) + b"".join(struct.pack("<HHII", *row) for row in rows) + bytes(4)
    places = struct.pack("<3H", 16, 16, 16) + struct.pack("<3I", 164, 292, 420) + struct.pack("<3I", 128, 128, 128)
    (tmp_path / "planes.tif").write_bytes(b"II*\0\x08\0\0\0" + directory + places + 3 * DEEP.astype("<u2").tobytes())
    with Image.open(tmp_path / "planes.tif") as opened:
        assert opened.mode == "RGB"
    with pytest.raises(DatasetError, match=r"planes.tif cannot be read .*channels of 16 bits lie one after another"):
        read_image(tmp_path / "planes.tif")


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_depths_of_unknown_range_are_refused_by_name(tmp_path: Path, kind: type) -> None:
    Image.fromarray(GREY.astype(kind)).save(tmp_path / "odd.tif")
    with pytest.raises(DatasetError, match=r"odd.tif cannot be read as an image \(its pixels are .*range is not known"):
        read_image(tmp_path / "odd.tif")


# -- damaged files -----------------------------------------------------------------------------------------------------


def _break(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("feed", ["memory", "stream"])
def test_all_damaged_files_are_listed_before_the_first_step_or_left_out(
    mine: MakeConfig, feed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mine(feed=feed, image_size=8, strong="weak")
    for name in ("train/bee/003.png", "unlabeled/001.png"):
        _break(Path(config.data_dir) / name)
    assert main(config) == 1
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("damaged: ") for line in said) == 2
    assert said[-1].startswith("error: ")
    assert not Path(str(config.output)).exists()
    config = dataclasses.replace(config, skip_damaged=True)
    assert main(dataclasses.replace(config, stop_after_steps=5)) == 0
    left = read_json(Path(str(config.output), "split.json"))["left_out"]
    assert sorted(left) == ["train/bee/003.png", "unlabeled/001.png"]
    assert main(config) == 0
    whole = dataclasses.replace(config, output=str(config.output) + "-whole")
    assert main(whole) == 0
    assert differing(str(whole.output), str(config.output)) == []


@pytest.mark.parametrize("feed", ["memory", "stream"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_file_that_goes_bad_later_does_not_cost_the_run(mine: MakeConfig, feed: str, gone: bool) -> None:
    config = mine(feed=feed, image_size=8, strong="weak", stop_after_steps=5)
    assert run(config) == 0
    for name in ("train/bee/003.png", "unlabeled/001.png"):
        path = Path(config.data_dir) / name
        path.unlink() if gone else _break(path)
    match = r"2 files are gone \(.*: restore them, or give --skip-damaged" if gone else "--skip-damaged"
    with pytest.raises((ResumeError, DatasetError), match=match):
        run(dataclasses.replace(config, stop_after_steps=None))
    config = dataclasses.replace(config, stop_after_steps=None, skip_damaged=True)
    left = [line["file"] for line in json_lines(trained(config) / "left_out.jsonl")]
    assert sorted(set(left)) == ["train/bee/003.png", "unlabeled/001.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_goes_bad_in_a_run_is_one_line_or_replaced(
    mine: MakeConfig, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mine(feed="stream", image_size=8, strong="weak", check_images=False, workers=workers, hold_out=0.25)
    for path in Path(config.data_dir).glob("unlabeled/0*.png"):
        _break(path)
    assert main(config) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ")
    assert "start the same command again with --skip-damaged" in said
    assert main(dataclasses.replace(config, skip_damaged=True)) == 0
    assert "unlabeled/00" in Path(str(config.output), "left_out.jsonl").read_text()


# -- networks, optimizers ----------------------------------------------------------------------------------------------


def test_a_network_of_ones_own(mine: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("mynets.py").write_text(
        "from torch import nn\n"
        "def small(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, classes))\n"
        "def wrong(classes):\n    return 3\n"
        "def tall(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(7, classes))\n"
    )
    config = mine(arch="mynets:small", optimizer="adamw", clip_norm=1.0, accumulate=2, flip=False, weight_decay=0.05)
    assert run(dataclasses.replace(config, stop_after_steps=5)) == 0
    model, about = load_model(str(config.output))  # of an unfinished run
    assert (about["steps"], type(model).__name__, about["classes"]) == (5, "Sequential", ["ant", "bee"])
    assert run(config) == 0
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    assert run(whole) == 0
    assert differing(str(whole.output), str(config.output), least=40) == []  # of two layers
    again = mine("again", arch="mynets:small", init_from=str(config.output), init_part="encoder", stop_after_steps=1)
    assert run(again) == 0
    no_timm = r"timm has no such model; write for example timm:resnet"
    if importlib.util.find_spec("timm") is None:
        no_timm = r"--arch timm:resnet1888 needs timm: pip install timm"
    for arch, message in (
        ("mynets:wrong", r"returned a int: return the network"),
        ("mynets:absent", r"calling absent\(2\) failed \(AttributeError"),
        ("mynets:tall", r"does not take images of 8x8"),
        ("timm:resnet1888", no_timm),
    ):
        with pytest.raises(OptionError, match=message):
            run(mine("other", arch=arch))


def test_the_mean_gradient_of_accumulated_batches_is_that_of_the_joined_one(tiny: MakeConfig) -> None:
    """By plain labels, without statistics or draws that a batch of another size would change."""
    from trainer.loader import StepDataset, StepImages, ToModel
    from trainer.split import draw_split
    from trainer.step import Trainer

    common: dict[str, Any] = {"method": "supervised", "threshold": None, "arch": "wrn-10-1-gn", "optimizer": "sgd"}
    states = []
    for changes in ({"accumulate": 2}, {"batch_size": 8}):
        config = resolve(tiny(**{**common, **changes}))
        images = load_images(config)
        trainer = Trainer.fresh(config, 10, ToModel([0.5] * 3, [0.25] * 3, torch.device("cpu")), 100)
        dataset = StepDataset(images, draw_split(images, 20, 0), dataclasses.replace(config, batch_size=4))
        both = [dataset[0], dataset[1]]
        joined = StepImages(*(torch.cat(fields) for fields in zip(*both, strict=True)))
        feed = iter(both if config.accumulate == 2 else [joined])
        trainer.train_step(lambda feed=feed: next(feed))
        states.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.allclose(states[0], states[1], rtol=0, atol=1e-6)


def test_timm_and_torchvision_networks_are_built_with_a_new_head() -> None:
    pytest.importorskip("timm")
    assert build_model("timm:resnet10t", 5).get_classifier().out_features == 5
    assert build_model("resnet18", 5).fc.out_features == 5
    with pytest.raises(OptionError, match="wrn-10-1 has no published weights"):
        build_model("wrn-10-1", 5, pretrained=True)


# -- after training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feed", ["memory", "stream"])
def test_predict_and_evaluate_read_a_run_and_its_checkpoints(
    photo_folder: MakeFolder, tiny: MakeConfig, capsys: pytest.CaptureFixture[str], feed: str, tmp_path: Path
) -> None:
    root = photo_folder(train={"ant": 6, "bee": 6}, test={"ant": 3, "bee": 5}, size=(10, 12))
    config = tiny(dataset="folder", data_dir=str(root), image_size=8, labels=8, feed=feed, strong="weak")
    folder = trained(config)
    accuracy = read_json(folder / "summary.json")["last"]
    capsys.readouterr()
    assert evaluate.main([str(folder), str(root / "test"), "--output", str(tmp_path / "confusion.png")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"accuracy {accuracy:.4f}, ")
    assert "8 images" in said
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    outputs = []
    for given in (folder, folder / "model.safetensors", folder / "checkpoints" / "step-00000012.pt"):
        assert predict.main([str(given), str(root / "test"), "--top", "2"]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1
    lines = outputs[0].splitlines()
    assert (len(lines), lines[0]) == (9, "file,class_1,probability_1,class_2,probability_2")
    found = sum(Path(line.split(",")[0]).parent.name == line.split(",")[1] for line in lines[1:])
    assert found / 8 == accuracy
    classifier = predict.load(folder)
    image = root / "test" / "ant" / "000.png"
    with torch.no_grad():
        logits = classifier.model(classifier.preprocess(image)[None])
    assert torch.equal(logits.softmax(1), classifier([image]))
    _break(image)
    assert predict.main([str(folder), str(root / "test" / "ant")]) == 1
    assert "error: " in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="give a run's directory"):
        load_model(tmp_path)


def test_letters_that_no_font_has_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.draw_confusion([[2, 1], [0, 3]], ["\ue000", "\ue001\ue002"], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    said = f"note: {tmp_path / 'confusion.png'} has boxes for letters that no font of this machine has\n"
    assert capsys.readouterr().err == said


# -- comfort -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("absent", "command", "status", "message"),
    [
        ("torch", "fixmatch_imagenet.py --help", 0, "--skip-damaged"),
        ("torch", "fixmatch_imagenet.py --epochs 3", 2, "error: --epochs is no option; this trainer counts steps"),
        ("torch", "fixmatch_imagenet.py --labelz 3", 2, "error: --labelz is no option; did you mean --labels?"),
        ("torch", "fixmatch_imagenet.py --steps many", 2, "error: .*--steps"),
        *[
            ("tyro", program, 2, "error: tyro is not installed, which this program needs: .*pip install '.[examples]'")
            for program in ("fixmatch_imagenet.py", "demo.py --output out", "reproduce.py --output out")
        ],
    ],
)
def test_help_and_mistakes_need_no_torch_and_what_is_absent_is_named(
    tmp_path: Path, absent: str, command: str, status: int, message: str
) -> None:
    (tmp_path / f"{absent}.py").write_text(f"raise ModuleNotFoundError('none', name='{absent}')")
    script, *arguments = command.split()
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert all(part in done.stdout + done.stderr for part in message.split(".*"))
    assert status == 0 or done.stderr.count("\n") == 1


def test_csv_holds_every_line_of_the_log(mine: MakeConfig) -> None:
    config = mine(csv=True, hold_out=0.25)
    folder = trained(config)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("kind,step,")
    assert len(rows) == 1 + len((folder / "metrics.jsonl").read_text().splitlines())
