from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import demo
import report
from gradconsist import RandomProjection, SSLBatch
from gradconsist.methods import FixMatch
from support.runs import MakeConfig, stepped
from trainer.checkpoint import load_latest
from trainer.config import Config, resolve
from trainer.datasets import load_images
from trainer.loader import StepDataset, ToModel
from trainer.methods import METHODS, build_method
from trainer.models import build_model
from trainer.optimizer import AveragedModel, build_optimizer, set_learning_rate
from trainer.split import draw_split
from trainer.training import run


def checkpoint(config: Config) -> dict[str, Any]:
    loaded = load_latest(Path(str(config.output)) / "checkpoints")
    assert loaded is not None
    return loaded


def same_tensors(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a if isinstance(a[key], torch.Tensor))


def plain_fixmatch(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """FixMatch by hand: the library's method in a loop of six lines, with no trainer and no wrapper."""
    config = resolve(config)
    images = load_images(config)
    to_model = ToModel(*images.channel_statistics, torch.device("cpu"), channels_last=False)
    dataset = StepDataset(images, draw_split(images, config.labels, config.seed), config)
    torch.manual_seed(config.seed)
    model = build_model(config.arch, 10, momentum=float(config.bn_momentum or 0))
    method = FixMatch(model, threshold=config.threshold, unlabeled_ramp_steps=config.unlabeled_ramp)
    optimizer = build_optimizer(model, lr=config.lr, weight_decay=float(config.weight_decay or 0))
    average = AveragedModel(model, config.ema, warmup=bool(config.ema_warmup))
    for step in range(config.steps):
        set_learning_rate(optimizer, config.lr, step, config.steps)
        optimizer.zero_grad()
        method(to_model.batch(dataset[step])).loss.backward()
        optimizer.step()
        average.update(model)
    return method.state_dict(), average.model.state_dict()


def test_ggcr_weight_0_is_plain_fixmatch_bitwise(tiny: MakeConfig) -> None:
    config = tiny(ggcr_weight=0.0)
    assert run(config) == 0
    saved = checkpoint(config)
    method, average = plain_fixmatch(config)
    assert same_tensors(saved["method"], method)
    assert same_tensors(saved["average"]["model"], average)


def test_ggcr_before_its_warmup_is_plain_fixmatch_bitwise_and_then_is_not(tiny: MakeConfig) -> None:
    saved = {}
    for name, warmup in (("later", 100), ("earlier", 2)):
        config = tiny(name, ggcr_warmup=warmup)
        assert run(config) == 0
        saved[name] = checkpoint(config)["average"]["model"]
    plain = plain_fixmatch(tiny())[1]
    assert same_tensors(saved["later"], plain)
    assert not same_tensors(saved["earlier"], plain)


def test_a_term_that_can_never_act_is_said(tiny: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny(ggcr_warmup=100, stop_after_steps=1, progress="lines")) == 0
    assert "note: --ggcr-warmup 100 >= --steps 12: the term is never added" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "prefix", "tensors"), [("encoder", "encoder.", 23), ("all", "", 25), ("encoder.1.", "encoder.1.", 6)]
)
def test_ggcr_encoder_decides_what_is_compared(tiny: MakeConfig, option: str, prefix: str, tensors: int) -> None:
    model = build_model("wrn-10-1", 10, momentum=0.1).eval()
    chosen = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
    assert len(chosen) == tensors
    consistency = build_method(model, resolve(tiny(ggcr_encoder=option, ggcr_max_pairs=None))).consistency
    x, y = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    model.eval()
    got = consistency.measure(x, x, y).norm_weak
    for n in range(3):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), chosen)
        expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert got[n].item() == pytest.approx(expected.item(), rel=1e-4)


def test_supervised_uses_no_unlabeled_image_and_no_term(tiny: MakeConfig) -> None:
    config = tiny(method="supervised")
    assert run(config) == 0
    saved = checkpoint(config)
    assert saved["options"]["ggcr_weight"] == 0.0
    model = build_model("wrn-10-1", 10, momentum=0.1)
    method = build_method(model, resolve(config))
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    out = method(SSLBatch(x, y, x[:0], x[:0]))
    assert out.pair is None
    assert out.loss.item() == pytest.approx(F.cross_entropy(model(x), y).item())


def test_every_method_trains(tiny: MakeConfig) -> None:
    """Two steps, the second with the term: finite, and another model than without the term."""
    for method in METHODS:
        parameters = []
        for weight in (0.0, 0.5):
            changes = {"ggcr_weight": weight, "ggcr_warmup": 1, "ggcr_every": 1, "ggcr_gate": "all"}
            trainer, _ = stepped(tiny(method=method, threshold=None, unlabeled_ramp=1, **changes), 2)
            parameters.append(dict(trainer.model.named_parameters()))
            assert all(torch.isfinite(value).all() for value in parameters[-1].values())
        assert same_tensors(*parameters) == (method == "supervised")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("stop_gradient", "weak"), ("stop_gradient", "strong"), ("batchnorm", "running"), ("batchnorm", "observed"),
        ("through_statistics", True), ("through_statistics", False),
        ("projection", "kronecker:4"),
    ],
)  # fmt: skip
def test_options_of_the_term_reach_it(tiny: MakeConfig, option: str, value: Any) -> None:
    config = resolve(tiny(seed=7, **{f"ggcr_{option}": value}))
    consistency = build_method(build_model("wrn-10-1", 10, momentum=0.1), config).consistency
    expected = RandomProjection(4, "kronecker", seed=7, resample_every=1) if option == "projection" else value
    assert getattr(consistency, option) == expected


@pytest.mark.parametrize("changes", [{"joint_forward": False}, {"ema": 0.0}])
def test_variants_train_and_resume(tiny: MakeConfig, changes: dict[str, Any]) -> None:
    config = tiny(steps=4, eval_every=2, **changes)
    assert run(dataclasses.replace(config, stop_after_steps=3)) == 0
    assert run(config) == 0
    parameters = checkpoint(config)["average"]["model"]
    assert all(torch.isfinite(value).all() for value in parameters.values())


def test_training_learns_the_digits(tiny: MakeConfig) -> None:
    config = tiny(method="supervised", labels=40, batch_size=20, steps=60, eval_every=60, lr=0.1)
    assert run(config) == 0
    assert checkpoint(config)["evaluations"][-1]["test"] > 0.6  # chance is 0.1


def test_plain_lines_without_a_terminal(tiny: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny(method="supervised", steps=4, eval_every=2, progress="auto")) == 0
    said = capsys.readouterr().err
    assert (
        "supervised on digits (1,442 training images 8x8, 10 classes, 20 labels), wrn-10-1 (77,850 parameters, " in said
    )
    assert "split SHA-256 " in said
    assert "step 4/4" in said
    assert "\r" not in said
    assert "curves: " in said


def test_a_bar_where_one_is_wanted(tiny: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny(method="supervised", steps=4, progress="bar")) == 0
    assert "4/4" in capsys.readouterr().err


def _rows(table: str) -> list[list[str]]:
    """The columns of a table's finished runs."""
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if " 3/3 " in line]


def test_demo_prints_a_table_and_draws_all_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path / "demo"), "--steps", "3"]
    assert demo.main(arguments) == 0
    said = capsys.readouterr().out
    rows = _rows(said)
    names = ("supervised", "fixmatch", "fixmatch+ggcr")
    assert [row[1:5] for row in rows] == [[name, "digits", "0", "3/3"] for name in names]
    assert all(0 <= float(row[5]) <= 1 for row in rows)
    assert f"curves: {tmp_path / 'demo' / 'curves.png'}" in said
    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert demo.main(arguments) == 0  # again: everything is there already
    assert capsys.readouterr().out.count("is finished") == 3

    picture = tmp_path / "pictures" / "all.png"
    folders = [str(tmp_path / "demo" / f"{name}-seed0") for name in ("supervised", "fixmatch")]
    assert report.main([*folders, "--output", str(picture)]) == 0
    assert [row[1:5] for row in _rows(capsys.readouterr().out)] == [[name, "digits", "0", "3/3"] for name in names[:2]]
    assert picture.read_bytes().startswith(b"\x89PNG")
