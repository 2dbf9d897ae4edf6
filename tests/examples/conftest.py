"""Small runs on the embedded digits, folders of tiny images, and the real photographs where they are at hand."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.datasets import Images

try:
    for package in ("torchvision", "sklearn", "tyro", "tqdm", "matplotlib", "safetensors"):
        importlib.import_module(package)
    UNUSABLE = None
except (ImportError, RuntimeError) as error:  # torchvision beside another torch's build raises a RuntimeError
    UNUSABLE = str(error)
    collect_ignore_glob = ["test_*.py"]

ROOT = Path(__file__).parents[2]
DATA = ROOT / ".." / "shared" / "data"

# Seconds, not minutes: 8x8 digits, 4 labeled and 8 unlabeled images a step, everything switched on from step 2.
TINY: dict[str, Any] = {
    "labels": 20, "batch_size": 4, "unlabeled_ratio": 2, "steps": 12, "threshold": 0.12, "unlabeled_ramp": 6,
    "ggcr_warmup": 2, "ggcr_max_pairs": 2, "ggcr_every": 2, "eval_every": 4, "checkpoint_every": 5, "log_every": 3,
    "workers": 0, "progress": "none",
}  # fmt: skip

MakeConfig = Callable[..., "Config"]


def pytest_report_header() -> str | None:
    """Say why the trainers are not tested, where they are not."""
    return f"tests/examples: left out, the examples extra is missing ({UNUSABLE})" if UNUSABLE else None


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """8x8 images are too small to share: with two threads on a busy machine these tests take several times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run draws a picture, half a second: only those that fixtures of wider scope train are drawn here."""
    monkeypatch.setattr("trainer.training.draw_curves", lambda runs, path, **_: path.touch())


@pytest.fixture(scope="session")
def tiny_at() -> MakeConfig:
    """A factory of small configurations: `tiny_at(folder, option=value)`."""
    from trainer.config import preset_config

    def make(folder: Path, **changes: Any) -> Config:
        return dataclasses.replace(preset_config("demo"), **{**TINY, "output": str(folder), **changes})

    return make


@pytest.fixture
def tiny(tiny_at: MakeConfig, tmp_path: Path) -> MakeConfig:
    """The same below the test's own folder: `tiny("name", option=value)`."""
    return lambda name="run", **changes: tiny_at(tmp_path / name, **changes)


# 16x16 photographs and the same network: four steps, gradient consistency from the second on.
TINY_PHOTOGRAPHS: dict[str, Any] = {
    "arch": "wrn-10-1", "image_size": 16, "label_fraction": 0.34, "batch_size": 4, "unlabeled_ratio": 1,
    "threshold": 0.2, "unlabeled_ramp": 0, "steps": 4, "lr": 0.01, "lr_warmup": 1, "ggcr_warmup": 1, "ema": 0.9,
    "eval_every": 2, "checkpoint_every": 2, "log_every": 2, "workers": 0, "progress": "none", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="session")
def photographs_at() -> MakeConfig:
    """A factory: `photographs_at(folder, name, option=value)` makes JPEGs of three classes, and options."""
    from support.pictures import draw_folder
    from trainer.config import IMAGENET

    def make(folder: Path, name: str = "run", **changes: Any) -> Config:
        parts = {part: dict.fromkeys(("ant", "bee", "cat"), count) for part, count in (("train", 12), ("val", 5))}
        draw_folder(folder / "photos", parts, size=(24, 20), name="{label}_{number}.JPEG")
        places = {"data_dir": str(folder / "photos"), "output": str(folder / name)}
        return dataclasses.replace(IMAGENET["paper"], **{**TINY_PHOTOGRAPHS, **places, **changes})

    return make


@pytest.fixture
def photographs(photographs_at: MakeConfig, tmp_path: Path) -> MakeConfig:
    """The same below the test's own folder: `photographs("name", option=value)`."""
    return lambda name="run", **changes: photographs_at(tmp_path, name, **changes)


@pytest.fixture
def random_images() -> Images:
    """60 random 32x32 training images of 3 classes, and 6 test images."""
    from trainer.datasets import Images

    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(256, (66, 32, 32, 3), generator=generator, dtype=torch.uint8)
    labels = torch.arange(66) % 3
    return Images("random", ["a", "b", "c"], pixels[:60], labels[:60], pixels[60:], labels[60:], flip=True)


@pytest.fixture
def photo_folder(tmp_path: Path) -> Callable[..., Path]:
    """A factory of folder data sets: `photo_folder(train={"cat": 3}, test={"cat": 1}, size=(8, 8))`."""
    from support.pictures import draw_folder

    return lambda name="photos", *, size=(8, 8), **parts: draw_folder(tmp_path / name, parts, size=size)


@pytest.fixture(scope="session")
def paper_source() -> str:
    """The LaTeX source of the paper, where it lies beside the real images."""
    data = Path(os.environ.get("GRADCONSIST_DATA", DATA))
    path = data.parent / "paper" / "main.tex"
    if not path.is_file():
        pytest.skip(f"no {path}: the transcribed claims cannot be compared with the paper here")
    return path.read_text(encoding="utf-8")
