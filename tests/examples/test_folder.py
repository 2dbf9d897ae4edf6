from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.pictures import MakeFolder
from trainer.config import Config
from trainer.datasets import Images, load_images
from trainer.errors import DatasetError


def load_folder(root: Path, image_size: int | None = None) -> Images:
    data = load_images(Config(dataset="folder", data_dir=str(root), image_size=image_size))
    assert isinstance(data, Images)
    return data


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_classes_are_sorted_and_images_are_exact(photo_folder: MakeFolder, held_out: str) -> None:
    root = photo_folder(train={"dog": 2, "cat": 3}, **{held_out: {"cat": 1, "dog": 1}})
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    (root / "train" / ".hidden").mkdir()
    data = load_folder(root)
    assert data.classes == ["cat", "dog"]
    assert data.train_y.tolist() == [0, 0, 0, 1, 1]
    assert data.test_y.tolist() == [0, 1]
    assert data.train_x.dtype == torch.uint8
    assert data.train_x.shape == (5, 8, 8, 3)
    assert data.test_x.shape == (2, 8, 8, 3)
    with Image.open(root / "train" / "dog" / "001.png") as image:
        assert np.array_equal(data.train_x[4].numpy(), np.asarray(image))


def test_grey_and_transparent_images_become_rgb(photo_folder: MakeFolder) -> None:
    root = photo_folder(train={"a": 1, "b": 1}, test={"a": 1, "b": 1})
    Image.new("L", (8, 8), 90).save(root / "train" / "a" / "grey.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(root / "train" / "a" / "transparent.png")
    assert load_folder(root).train_x[1].unique().tolist() == [90]


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"--data-dir .*nowhere is not a directory: expected .*train/CLASS/IMAGE"):
        load_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("parts", [{"test": {"a": 1}}, {"images": {"a": 1}}])
def test_wrong_layout_says_what_was_found(photo_folder: MakeFolder, parts: dict[str, dict[str, int]]) -> None:
    with pytest.raises(DatasetError, match=rf"holds {next(iter(parts))}: expected --data-dir to hold train/CLASS"):
        load_folder(photo_folder(**parts))


def test_class_sets_that_differ_are_named(photo_folder: MakeFolder) -> None:
    root = photo_folder(train={"a": 1, "b": 1}, test={"b": 1, "c": 1})
    with pytest.raises(DatasetError, match=r"only in train: \['a'\]; only in test: \['c'\]"):
        load_folder(root)


def test_one_class_is_refused(photo_folder: MakeFolder) -> None:
    with pytest.raises(DatasetError, match="has 1 class directories; a classifier needs at least two"):
        load_folder(photo_folder(train={"a": 1}, test={"a": 1}))


def test_empty_class_is_refused(photo_folder: MakeFolder) -> None:
    root = photo_folder(train={"a": 1, "b": 0}, test={"a": 1, "b": 1})
    with pytest.raises(DatasetError, match=r"train.b holds no image .*add images or remove the class"):
        load_folder(root)


def test_sizes_that_differ_are_refused_unless_a_size_is_given(photo_folder: MakeFolder) -> None:
    root = photo_folder(train={"a": 1, "b": 1}, test={"a": 1, "b": 1})
    Image.new("RGB", (12, 9)).save(root / "test" / "b" / "000.png")
    with pytest.raises(DatasetError, match=r"b.000.png is 12x9, but .*a.000.png is 8x8: give --image-size"):
        load_folder(root)
    assert load_folder(root, 6).test_x.shape == (2, 6, 6, 3)


def test_resizing_keeps_proportions_and_crops_the_centre(photo_folder: MakeFolder) -> None:
    root = photo_folder(train={"a": 1, "b": 1}, test={"a": 1, "b": 1})
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255  # the centre square is white, all else is black
    Image.fromarray(wide).save(root / "train" / "a" / "000.png")
    assert (load_folder(root, 10).train_x[0] == 255).all()


def test_progress_is_said(photo_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    load_folder(photo_folder(train={"a": 2, "b": 1}, test={"a": 1, "b": 1}))
    assert "decoded 5 of 5 images" in capsys.readouterr().err
