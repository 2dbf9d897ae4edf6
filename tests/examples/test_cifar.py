"""CIFAR as the trainer sees it: torchvision's classes with images of one colour instead of a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets

from support.runs import MakeConfig, trained
from trainer.config import Config, resolve
from trainer.datasets import load_images
from trainer.loader import StepDataset
from trainer.split import draw_split
from trainer.weights import load_model

SIDE = 4  # of the stand-ins; the counts and the classes are CIFAR's


def stand_in(classes: int, images: int) -> type:
    class StandIn:
        url, filename = "https://example.org/cifar.tar.gz", "cifar.tar.gz"

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert download
            count = images if train else images // 5
            # Labels in an order that no split may rely on.
            labels = (np.arange(count) * 7) % classes
            self.targets = labels.tolist()
            self.data = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (count, SIDE, SIDE, 3)).copy()
            self.classes = [f"class {k}" for k in range(classes)]

    return StandIn


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def install(images: int) -> None:
        for name, classes in (("CIFAR10", 10), ("CIFAR100", 100)):
            monkeypatch.setattr(torchvision.datasets, name, stand_in(classes, images))

    return install


@pytest.mark.parametrize(
    ("dataset", "labels", "classes", "decay"),
    [
        ("cifar10", 40, 10, 5e-4), ("cifar10", 250, 10, 5e-4), ("cifar10", 4000, 10, 5e-4),
        ("cifar100", 400, 100, 1e-3), ("cifar100", 2500, 100, 1e-3),
    ],
)  # fmt: skip
def test_the_protocols_of_cifar(
    cifar: Callable[[int], None], dataset: str, labels: int, classes: int, decay: float
) -> None:
    cifar(50_000)
    config = resolve(Config(dataset=dataset, labels=labels, batch_size=8))  # type: ignore[arg-type]
    assert config.weight_decay == decay
    images = load_images(config)
    assert images.train_x.shape == (50_000, SIDE, SIDE, 3)
    assert (images.train_x.dtype, images.train_y.dtype, images.flip) == (torch.uint8, torch.int64, True)
    assert images.test_x.shape == (10_000, SIDE, SIDE, 3)
    split = draw_split(images, labels, config.seed)
    assert torch.bincount(images.train_y[split.labeled], minlength=classes).tolist() == [labels // classes] * classes
    assert not torch.equal(split.labeled, draw_split(images, labels, 1).labeled)
    step = StepDataset(images, split, config)[3]
    assert (len(step.x), len(step.weak), len(step.strong)) == (8, 56, 56)
    assert torch.equal(step.x[:, 0, 0, 0].long(), step.y)  # the colour is the class
    assert torch.equal(step.weak[:, 0, 0, 0].long(), step.truth)


@pytest.mark.parametrize("preset", ["paper", "fixmatch"])
def test_a_run_on_cifar_100(cifar: Callable[[int], None], tiny: MakeConfig, preset: Any) -> None:
    cifar(500)
    config = tiny(preset=preset, dataset="cifar100", labels=100, steps=3, eval_every=3, ggcr_warmup=1)
    model, about = load_model(trained(config) / "model.safetensors")
    assert (about["dataset"], len(about["classes"]), about["image_size"]) == ("cifar100", 100, [SIDE, SIDE])
    assert model.head.out_features == 100
