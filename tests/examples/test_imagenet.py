"""The ImageNet trainer in one process: options, files, labels, views, networks, a run and its continuation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from support.runs import MakeConfig, differing, final, trained
from trainer.cli import parse_config
from trainer.config import IMAGENET, Config, resolve
from trainer.datasets import PhotographFolder, load_images
from trainer.errors import DatasetError, OptionError, ResumeError
from trainer.files import read_json
from trainer.loader import StepImages, StepPhotographs, worker_count
from trainer.models import build_network, classifier_head
from trainer.optimizer import cosine_factor, set_learning_rate
from trainer.processes import Processes, join
from trainer.split import choose_labeled
from trainer.training import run


def part(rank: int, world: int) -> Processes:
    return Processes(rank, world, world, torch.device("cpu"))


ALONE = part(0, 1)


def listed(root: Path) -> PhotographFolder:
    data = load_images(dataclasses.replace(IMAGENET["paper"], data_dir=str(root)))
    assert isinstance(data, PhotographFolder)
    return data


# -- options -----------------------------------------------------------------------------------------------------------


def test_defaults_of_the_presets() -> None:
    paper = resolve(parse_config([], IMAGENET))
    assert (paper.arch, paper.image_size, paper.label_fraction, paper.steps) == ("resnet50", 224, 0.01, 2**20)
    assert (paper.threshold, paper.unlabeled_weight, paper.unlabeled_ratio, paper.unlabeled_ramp) == (
        0.95,
        1.0,
        7,
        5000,
    )
    assert (paper.weight_decay, paper.ggcr_weight, paper.strong, paper.norm) == (5e-4, 0.1, "randaugment", "batch")
    assert paper.output == "runs/imagenet-0.01-fixmatch+ggcr-resnet50-seed0"
    reference = resolve(parse_config(["--preset", "fixmatch"], IMAGENET))
    assert (reference.threshold, reference.unlabeled_weight, reference.unlabeled_ratio) == (0.7, 10.0, 5)
    assert (reference.weight_decay, reference.ggcr_weight, reference.unlabeled_ramp) == (3e-4, 0.0, 0)
    assert resolve(IMAGENET["fixmatch"], 4).processes == 4


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"batch_size": 30}, 4, r"--batch-size 30 is shared by 4 processes .*give 32"),
        ({"ggcr_max_pairs": 5}, 2, r"--ggcr-max-pairs 5 is shared by 2 processes"),
        ({"label_fraction": 0.0}, 1, r"--label-fraction is a share in \(0, 1\].*found 0.0"),
        ({"labels": -1}, 1, r"--labels must be above 0, or all; found -1"),
        ({"labels": 50}, 1, r"--labels 50 and --label-fraction 0.34: give one of them"),
        ({"crop_scale": 1.5}, 1, r"--crop-scale is a share .*found 1.5"),
        ({"lr_warmup": 4}, 1, r"--lr-warmup must be .* less than --steps 4; found 4"),
        ({"ggcr_chunk_size": 0}, 1, r"--ggcr-chunk-size must be above 0, or auto; found 0"),
        ({"method": "mixmatch"}, 2, r"--method mixmatch draws at random on each process"),
        ({"norm": "sync"}, 2, r"--norm sync: gradient consistency does not gather .*--norm group"),
        ({"lr": -1.0}, 1, r"--lr must be above 0"),
    ],
)
def test_bad_options_are_refused_by_name(
    photographs: MakeConfig, changes: dict[str, Any], processes: int, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        resolve(photographs(**changes), processes)


def test_torchruns_variables_must_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(OptionError, match=r"WORLD_SIZE is 2, but RANK, .* is not set: .* torchrun"):
        join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(OptionError, match=r"--device 'abacus' is not usable here"):
        join("abacus")


def test_the_learning_rate_rises_and_then_follows_the_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = [set_learning_rate(optimizer, 2.0, step, 10, 4) for step in range(10)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == [2.0 * cosine_factor(step, 6) for step in range(6)]


def test_workers_share_the_cores_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    stream = IMAGENET["paper"]
    given = dataclasses.replace(stream, workers=3)
    counts = [worker_count(stream, 1), worker_count(stream, 4), worker_count(stream, 12), worker_count(given, 12)]
    assert counts == [8, 2, 0, 3]


# -- files and labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp", "remedy"), [("bf16", "give --amp off"), ("fp16", "bf16 or --amp off")])
def test_a_device_without_the_half_type_is_refused(
    photographs: MakeConfig, monkeypatch: pytest.MonkeyPatch, amp: str, remedy: str
) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise RuntimeError("autocast to this type is not supported")

    monkeypatch.setattr(torch, "autocast", unsupported)
    with pytest.raises(OptionError, match=rf"--amp {amp} does not work on cpu .*not supported.*{remedy}"):
        run(photographs("half", amp=amp))


def test_the_digest_sees_names_and_sizes(photo_folder: Callable[..., Path]) -> None:
    root = photo_folder(train={"ant": 2, "bee": 1}, val={"ant": 1, "bee": 1})
    before = listed(root).digest()
    assert listed(root).digest() == before
    file = root / "val" / "bee" / "000.png"
    file.write_bytes(file.read_bytes() + b"\0")
    longer = listed(root).digest()
    (root / "train" / "ant" / "001.png").rename(root / "train" / "ant" / "002.png")
    assert len({before, longer, listed(root).digest()}) == 3


def test_a_fraction_of_each_class_is_labeled(photographs: MakeConfig) -> None:
    config = resolve(photographs(label_fraction=0.34))
    folder = listed(Path(config.data_dir))
    split = choose_labeled(folder, config)
    assert torch.bincount(folder.train_y[split.labeled]).tolist() == [4, 4, 4]
    assert torch.equal(choose_labeled(folder, config).labeled, split.labeled)
    other = choose_labeled(folder, dataclasses.replace(config, seed=1))
    assert not torch.equal(other.labeled, split.labeled)
    assert other.digest != split.digest
    one = choose_labeled(folder, dataclasses.replace(config, label_fraction=0.001))
    assert len(one.labeled) == 3  # at least one of each
    with pytest.raises(OptionError, match=r"--labels 39 asks for 13 .* class 'ant' has 12"):
        choose_labeled(folder, dataclasses.replace(config, label_fraction=None, labels=39))
    with pytest.raises(OptionError, match=r"--labels 2 cannot be balanced over 3 classes"):
        choose_labeled(folder, dataclasses.replace(config, label_fraction=None, labels=2))


def test_a_list_names_the_labeled_images(photographs: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("ant_3.JPEG\nbee/bee_0.JPEG\n\ntrain/cat/cat_11.JPEG\n")
    config = resolve(photographs(label_file=str(path), label_fraction=None))
    folder = listed(Path(config.data_dir))
    labeled = choose_labeled(folder, config).labeled
    assert [Path(folder.train.name(index)).name for index in labeled.tolist()] == [
        "ant_3.JPEG",
        "bee_0.JPEG",
        "cat_11.JPEG",
    ]
    for text, kind, message in (
        ("ant_99.JPEG\n", DatasetError, r"list.txt, line 1: 'ant_99.JPEG' is no training image in a class folder"),
        ("bee/ant_1.JPEG\n", DatasetError, r"line 1: 'bee/ant_1.JPEG' is no training image"),
        ("ant_1.JPEG\nant/ant_1.JPEG\n", DatasetError, r"line 2: 'ant/ant_1.JPEG' is the image of line 1"),
        ("ant_1.JPEG\nbee_1.JPEG\n", OptionError, r"names 2 images of 2 of the 3 classes, none of cat"),
        ("", OptionError, r"names 0 images of 0 of the 3 classes, none of ant, bee, cat"),
    ):
        path.write_text(text)
        with pytest.raises(kind, match=message):
            choose_labeled(folder, config)
    with pytest.raises(DatasetError, match=r"--label-file .*absent.txt cannot be read"):
        choose_labeled(folder, dataclasses.replace(config, label_file=str(tmp_path / "absent.txt")))


def test_a_name_in_two_classes_must_be_told_apart(photo_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = photo_folder(train={"ant": 1, "bee": 1}, val={"ant": 1, "bee": 1})
    (tmp_path / "list.txt").write_text("000.png\n")
    config = resolve(dataclasses.replace(IMAGENET["paper"], data_dir=str(root), label_file=str(tmp_path / "list.txt")))
    with pytest.raises(DatasetError, match=r"'000.png' is the name of images of several classes: write CLASS/NAME"):
        choose_labeled(listed(root), config)


# -- batches -----------------------------------------------------------------------------------------------------------


def batches(config: Config, processes: Processes) -> StepPhotographs:
    folder = listed(Path(config.data_dir))
    return StepPhotographs(folder, choose_labeled(folder, config), config, processes)


def test_the_parts_of_all_processes_are_the_whole_batch(photographs: MakeConfig) -> None:
    config = resolve(photographs(unlabeled_ratio=3))
    whole = batches(config, ALONE)[5]
    assert [len(field) for field in whole] == [4, 4, 12, 12, 12, 12]
    for world in (2, 4):
        parts = [batches(config, part(rank, world))[5] for rank in range(world)]
        joined = [torch.cat(fields) for fields in zip(*parts, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(joined, whole, strict=True))


def test_a_batch_is_a_function_of_seed_and_step(photographs: MakeConfig) -> None:
    config = resolve(photographs(unlabeled_ratio=3))
    state = torch.get_rng_state()
    dataset = batches(config, ALONE)
    first, again, other = dataset[0], batches(config, ALONE)[0], dataset[1]
    seeded = batches(dataclasses.replace(config, seed=1), ALONE)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for different in (other, seeded):
        assert not torch.equal(first.weak, different.weak)
        assert not torch.equal(first.strong, different.strong)
    assert not torch.equal(first.weak, first.strong)
    # A photograph that comes twice has other views: 36 of them serve 12 draws a step.
    later = next(dataset[step] for step in range(3, 6) if int(first.indices[0]) in dataset[step].indices)
    place = int((later.indices == first.indices[0]).nonzero()[0])
    assert not torch.equal(first.weak[0], later.weak[place])


def test_views_are_torchvisions_and_of_the_size_asked_for(photographs: MakeConfig) -> None:
    config = resolve(photographs(image_size=20))
    images: StepImages = batches(config, ALONE)[0]
    assert images.x.shape == (4, 20, 20, 3)
    assert images.x.dtype == torch.uint8
    supervised = batches(resolve(photographs(method="supervised")), ALONE)[0]
    assert supervised.weak.shape == (0, 16, 16, 3)


# -- networks ----------------------------------------------------------------------------------------------------------


def test_group_norm_takes_the_place_of_every_batch_norm(photographs: MakeConfig) -> None:
    torch.manual_seed(0)
    network = build_network(photographs(arch="shufflenet_v2_x0_5", norm="group"), 7, ALONE)
    kinds = [type(module) for module in network.modules()]
    assert nn.GroupNorm in kinds
    assert nn.BatchNorm2d not in kinds
    assert classifier_head(network) == ("fc", network.fc)
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    torch.manual_seed(0)
    plain = build_network(photographs(arch="shufflenet_v2_x0_5", bn_momentum=0.25), 7, ALONE)
    assert {m.momentum for m in plain.modules() if isinstance(m, nn.BatchNorm2d)} == {0.25}
    assert plain.state_dict()["conv1.0.weight"].equal(network.state_dict()["conv1.0.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "resnet51"}, r"--arch 'resnet51' is no classifier of torchvision.models: .*resnet"),
        ({"arch": "squeezenet1_1"}, r"--arch: SqueezeNet has no linear layer"),
        ({"arch": "alexnet", "norm": "group"}, r"--norm group: alexnet has no BatchNorm"),
        ({"norm": "sync"}, r"--norm sync is for several processes, and there is one"),
    ],
)
def test_networks_that_cannot_be_are_refused(photographs: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build_network(photographs(**changes), 3, ALONE)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_cifar_trainers_leaves_and_continues_bitwise(photographs: MakeConfig) -> None:
    whole, cut = photographs("whole"), photographs("cut")
    assert run(whole) == 0
    assert run(dataclasses.replace(cut, stop_after_steps=3)) == 0
    assert final(str(cut.output))[".step"] == 3
    assert run(dataclasses.replace(cut, workers=1)) == 0
    assert differing(str(whole.output), str(cut.output)) == []
    folder = Path(str(whole.output))
    assert {"config.json", "split.json", "metrics.jsonl", "summary.json", "curves.png"} <= {
        path.name for path in folder.iterdir()
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluation = lines[-1]
    assert evaluation["test_accuracy_top5"] == 1.0  # of three classes
    assert evaluation["test_accuracy"] * 15 == pytest.approx(round(evaluation["test_accuracy"] * 15))
    summary = read_json(folder / "summary.json")
    assert (summary["labels"], summary["processes"], summary["last"]) == (12, 1, evaluation["test_accuracy"])
    with pytest.raises(ResumeError, match=r"--image-size: 16 there, 20 now"):
        run(dataclasses.replace(whole, image_size=20))


def test_weights_are_exported_under_torchvisions_names(photographs: MakeConfig) -> None:
    config = photographs(arch="shufflenet_v2_x0_5", method="supervised", steps=1, lr_warmup=0)
    folder = trained(config)
    state, weights = final(folder), safetensors.torch.load_file(folder / "model.safetensors")
    torchvision.models.get_model(config.arch, weights=None, num_classes=3).load_state_dict(weights)
    assert all(torch.equal(value, state[f".average.model.{name}"]) for name, value in weights.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": "bf16", "channels_last": True},
        {"method": "supervised"},
        {"method": "flexmatch", "threshold": None},
        {"method": "meanteacher", "threshold": None, "ggcr_weight": 0.0},
        {"method": "temporalensembling", "threshold": None, "ggcr_weight": 0.0},
        {"arch": "shufflenet_v2_x0_5", "ggcr_encoder": "conv5", "ggcr_projection": "kronecker:4",
         "ggcr_chunk_size": 1, "ggcr_warmup": 0},
    ],
    ids=["amp", "supervised", "flexmatch", "meanteacher", "temporalensembling", "encoder"],
)  # fmt: skip
def test_methods_and_precisions_take_a_step(photographs: MakeConfig, changes: dict[str, Any]) -> None:
    config = photographs(stop_after_steps=1, **changes)
    assert final(trained(config))[".step"] == 1
