from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from support.runs import MakeConfig
from trainer.config import resolve
from trainer.datasets import Images
from trainer.errors import DatasetError, OptionError, ResumeError
from trainer.files import read_json
from trainer.loader import StepDataset
from trainer.split import draw_split, read_list, store_or_check


@pytest.mark.parametrize("labels", [3, 12, 60])
def test_split_is_balanced_and_without_repetition(random_images: Images, labels: int) -> None:
    split = draw_split(random_images, labels, seed=0)
    assert len(set(split.labeled.tolist())) == labels
    assert torch.bincount(random_images.train_y[split.labeled]).tolist() == [labels // 3] * 3


def test_same_seed_same_split_other_seed_other_split(random_images: Images) -> None:
    first, again, other = (draw_split(random_images, 12, seed) for seed in (1, 1, 2))
    assert first.digest == again.digest
    assert torch.equal(first.labeled, again.labeled)
    assert first.digest != other.digest


def test_digest_covers_labels_classes_and_pixels(random_images: Images) -> None:
    split = draw_split(random_images, 12, 0)
    renamed = dataclasses.replace(random_images, classes=["a", "b", "d"])
    assert draw_split(renamed, 12, 0).digest != split.digest
    pixels = random_images.train_x.clone()
    pixels[7, 0, 0, 0] ^= 1
    changed = draw_split(dataclasses.replace(random_images, train_x=pixels), 12, 0)
    assert changed.digest == split.digest
    assert changed.data_digest != split.data_digest


def test_unbalanced_number_of_labels_is_refused(random_images: Images) -> None:
    with pytest.raises(OptionError, match=r"--labels 40 .* 3 classes: give a multiple of 3, for example 39 or 42"):
        draw_split(random_images, 40, 0)
    with pytest.raises(OptionError, match=r"--labels 2 cannot be balanced .* for example 3 or 6"):
        draw_split(random_images, 2, 0)


def test_more_labels_than_images_is_refused(random_images: Images) -> None:
    with pytest.raises(OptionError, match=r"--labels 63 asks for 21 .* class 'a' has 20: give at most 60"):
        draw_split(random_images, 63, 0)


def test_split_is_stored_and_a_change_is_refused(random_images: Images, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    split = draw_split(random_images, 12, 0)
    store_or_check(path, split, random_images)
    store_or_check(path, split, random_images)
    assert read_json(path)["labeled"] == split.labeled.tolist()
    with pytest.raises(ResumeError, match="the labeled split differs"):
        store_or_check(path, draw_split(random_images, 12, 1), random_images)
    with pytest.raises(ResumeError, match=r"the data set .* differs"):
        store_or_check(path, dataclasses.replace(split, data_digest="other"), random_images)


def test_unlabeled_set_is_every_training_image(random_images: Images, tiny: MakeConfig) -> None:
    config = resolve(tiny(batch_size=5, unlabeled_ratio=4, strong="fixmatch"))
    dataset = StepDataset(random_images, draw_split(random_images, 12, 0), config)
    seen = torch.cat([dataset[step].indices for step in range(3)])
    assert sorted(seen.tolist()) == list(range(60))


def test_published_splits_are_read_as_they_are_published(random_images: Images, tmp_path: Path) -> None:
    chosen = [0, 1, 2, 10]
    np.save(tmp_path / "usb.npy", np.array(chosen))
    (tmp_path / "fixmatch.json").write_text(json.dumps({"distribution": [1 / 3] * 3, "label": chosen}))
    (tmp_path / "list.json").write_text(json.dumps(chosen))
    (tmp_path / "list.txt").write_text("\n".join(map(str, chosen)))
    for path in tmp_path.iterdir():
        assert read_list(path, random_images).tolist() == chosen
    np.save(tmp_path / "usb.npy", np.array([{"a": 1}]), allow_pickle=True)
    (tmp_path / "fixmatch.json").write_text('{"label": [1.5]}')
    for name in ("usb.npy", "fixmatch.json"):
        with pytest.raises(DatasetError, match=rf"--label-file .*{name} cannot be read .*also a .npy or .json file"):
            read_list(tmp_path / name, random_images)
