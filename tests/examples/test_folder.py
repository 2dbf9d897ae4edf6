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


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, r"--data-dir .*photos is not a directory: expected .*train/CLASS/IMAGE"),
        ({"test": {"a": 1}}, r"holds test: expected --data-dir to hold train/CLASS"),
        ({"images": {"a": 1}}, r"holds images: expected --data-dir to hold train/CLASS"),
        ({"train": {"a": 1, "b": 1}, "test": {"b": 1, "c": 1}}, r"only in train: \['a'\]; only in test: \['c'\]"),
        ({"train": {"a": 1}, "test": {"a": 1}}, "has 1 class directories; a classifier needs at least two"),
        ({"train": {"a": 1, "b": 0}, "test": {"a": 1, "b": 1}},
            r"train.b holds no image .*add images or remove the class"),
    ],
)  # fmt: skip
def test_a_wrong_layout_is_refused_and_says_what_was_found(
    photo_folder: MakeFolder, parts: dict[str, dict[str, int]], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        load_folder(photo_folder(**parts))


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
