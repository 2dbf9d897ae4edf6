from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision.datasets

import gradconsist.methods
import trainer.config
import trainer.methods
from gradconsist import SSLBatch
from gradconsist.errors import GradConsistError
from support.runs import MakeConfig
from trainer.cli import parse_config
from trainer.config import PRESETS, Config, preset_config, resolve
from trainer.datasets import load_images
from trainer.errors import DatasetError, OptionError
from trainer.methods import build_method
from trainer.models import build_model
from trainer.training import main, run


def parse(*arguments: str) -> Config:
    return parse_config(arguments, program="fixmatch_cifar.py", description="Trains.")


def test_defaults_are_those_of_the_contract() -> None:
    config = parse()
    assert (config.preset, config.dataset, config.data_dir, config.output) == ("paper", "cifar10", "data", None)
    assert (resolve(config).labels, config.method, config.seed, config.device) == (40, "fixmatch", 0, "auto")
    assert (config.ggcr_weight, config.ggcr_warmup, config.ggcr_every, config.ggcr_max_pairs) == (0.1, 1000, 1, None)
    assert (config.ggcr_engine, config.ggcr_projection, config.ggcr_gate) == ("auto", None, "method")
    assert (config.ggcr_encoder, config.steps, config.batch_size) == ("encoder", 2**20, 64)
    assert (config.arch, config.amp, config.ema, resolve(config).lr, config.resume) == (
        "wrn-28-2", "off", 0.999, 0.03, "auto",
    )  # fmt: skip
    settled = resolve(config)
    assert (settled.weight_decay, settled.bn_momentum, settled.ema_warmup) == (5e-4, 0.001, False)
    assert (settled.unlabeled_ramp, settled.strong, settled.unlabeled_ratio) == (5000, "randaugment", 7)
    assert (settled.threshold, settled.unlabeled_weight, settled.joint_forward) == (0.95, 1.0, True)
    assert settled.output == "runs/cifar10-40-fixmatch+ggcr-wrn-28-2-seed0"
    assert resolve(parse("--dataset", "cifar100", "--labels", "400")).weight_decay == 1e-3


def test_a_short_run_forgets_its_start_faster() -> None:
    short = resolve(parse("--steps", "2000"))
    assert (short.bn_momentum, short.ema_warmup) == (0.01, True)
    given = resolve(parse("--steps", "2000", "--bn-momentum", "0.001", "--ema-warmup", "False"))
    assert (given.bn_momentum, given.ema_warmup) == (0.001, False)


@pytest.mark.parametrize("preset", PRESETS)
def test_explicit_options_win_over_the_preset(preset: str) -> None:
    config = parse("--unlabeled-ramp", "7", "--preset", preset, "--labels=30")
    expected = dataclasses.replace(preset_config(preset), unlabeled_ramp=7, labels=30)  # type: ignore[arg-type]
    assert config == expected
    assert parse(f"--preset={preset}") == preset_config(preset)  # type: ignore[arg-type]


def test_a_method_brings_its_own_defaults() -> None:
    """Those of its paper or reference; a ramp of 40 % of the run, MixMatch's of 16,384 steps at most."""
    for method, expected in {
        "mixmatch": {"temperature": 0.5, "unlabeled_weight": 100.0, "unlabeled_ramp": 16384, "strong": "weak"},
        "meanteacher": {"method_decay": 0.99, "unlabeled_weight": 50.0, "unlabeled_ratio": 1, "unlabeled_ramp": 419430},
        "uda": {"threshold": 0.8, "temperature": 0.4, "unlabeled_ramp": 5000, "strong": "randaugment"},
        "freematch": {"threshold": None, "method_decay": 0.999, "unlabeled_ratio": 7},
        "pimodel": {"unlabeled_weight": 10.0, "strong": "weak"},
        "pseudolabel": {"threshold": 0.95, "unlabeled_ratio": 1, "strong": "randaugment"},
    }.items():
        settled = resolve(parse("--method", method))
        assert {name: getattr(settled, name) for name in expected} == expected
    short = resolve(parse("--method", "mixmatch", "--steps", "1000", "--preset", "demo"))
    assert (short.unlabeled_ramp, short.unlabeled_ratio) == (400, 1)
    given = resolve(parse("--method", "uda", "--threshold", "0.7", "--strong", "weak", "--unlabeled-ratio", "2"))
    assert (given.threshold, given.strong, given.unlabeled_ratio) == (0.7, "weak", 2)


def test_every_method_of_the_library_is_one_of_the_trainer() -> None:
    names = {name.lower() for name in gradconsist.methods.__all__} | {"supervised"}
    assert names == set(trainer.methods.METHODS) == set(trainer.config.METHOD_DEFAULTS)
    assert set(trainer.config.PRESET_DEFAULTS) == set(PRESETS)


def test_the_fixmatch_preset_is_the_reference_recipe() -> None:
    config = resolve(parse("--preset", "fixmatch"))
    assert (config.unlabeled_ramp, config.ggcr_weight, config.strong) == (0, 0.0, "fixmatch")


def test_the_supervised_baseline_has_the_brier_term(tiny: MakeConfig) -> None:
    """As FixMatch's labeled loss."""
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 8, 8, generator=draws)
    batch = SSLBatch(images[:4], torch.arange(4), images[4:], images[4:])
    model, losses = build_model("wrn-10-1", 10, momentum=0.1).eval(), []
    for weight in (0.0, 0.5):
        config = resolve(tiny(method="supervised", brier_weight=weight))
        losses.append(float(build_method(model, config)(batch).loss.detach()))
    p = model(batch.x).softmax(1).tolist()
    brier = sum((p[i][c] - (c == i)) ** 2 for i in range(4) for c in range(10)) / 4
    assert losses[1] == pytest.approx(losses[0] + 0.5 * brier, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lrr 1", "--lrr is no option; did you mean --lr?"),
        ("--preset best", "--preset 'best' is unknown: choose from paper, "),
        ("--labels some", "--labels is 'some'; expected an integer or \"all\" or None"),
        ("--lr=fast", "--lr is 'fast'; expected a number or None"),
        ("--norm layer", '--norm is \'layer\'; expected "batch" or "group" or "sync"'),
        ("--steps", "--steps is empty; expected an integer"),
        ("--no-steps", "--no-steps is no option; did you mean --steps?"),
        ("--num-classes 3", "--num-classes is no option; the classes are those of the data set"),
        ("stray", "Unrecognized options Unrecognized options: stray "),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*words.split())
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


def test_help_shows_the_defaults_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("--preset", "demo", "--help")
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "(default: digits)" in said
    assert "--ggcr-weight FLOAT" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps must be above 0; found 0"),
        (
            {"eval_statistics": "anew", "arch": "wrn-10-1-gn"},
            "--eval-statistics anew: wrn-10-1-gn has no BatchNorm, so no statistics; leave it out",
        ),
        ({"lr": float("nan")}, "--lr must be above 0; found nan"),
        (
            {"dataset": "folder", "data_dir": "photos", "output": "photos/unlabeled/run"},
            "--output photos/unlabeled/run lies among the images in unlabeled/",
        ),
        ({"batch_size": -1}, "--batch-size must be above 0"),
        ({"workers": -1}, "--workers must be 0 or more; found -1"),
        ({"ggcr_weight": -0.1}, "--ggcr-weight must be 0 or more; found -0.1"),
        ({"ggcr_weight": float("inf")}, "--ggcr-weight must be 0 or more; found inf"),
        ({"ggcr_every": 0}, "--ggcr-every must be above 0"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"seed": 2**63}, r"--seed must be below 2\^63"),
        ({"seed": 10**400}, r"--seed must be below 2\^63"),  # more than a float can be
        ({"ema": 1.0}, r"--ema is a decay in \[0, 1\), for example 0.999; found 1.0"),
        ({"threshold": 1.5}, "--threshold is a probability"),
        ({"bn_momentum": 2.0}, "--bn-momentum is in"),
        ({"image_size": 32}, "--image-size is for --dataset folder; --dataset digits has a size of its own"),
        ({"arch": "wrn-12-1"}, "--arch 'wrn-12-1': the depth must be 10, 16"),
        ({"ggcr_projection": "gaussian"}, "--ggcr-projection 'gaussian': write KIND:DIM, for example kronecker:16"),
        ({"ggcr_projection": "normal:8"}, "--ggcr-projection 'normal:8': write KIND:DIM.*choose one of 'kronecker'"),
        ({"ggcr_projection": "gaussian:0"}, "--ggcr-projection 'gaussian:0': write KIND:DIM.*at least 1"),
        ({"ggcr_projection": "sparse:8"}, "--ggcr-projection 'sparse:8': .*which was removed.*'kronecker'"),
        ({"method": "mixmach"}, "--method 'mixmach' is unknown: choose from fixmatch, flexmatch, .*mixmatch, .*uda"),
        ({"method": "mixmatch"}, "--threshold 0.12: mixmatch has no such option; leave it out"),
        ({"method": "flexmatch", "brier_weight": 0.5}, "--brier-weight 0.5: flexmatch has no such option"),
        ({"method": "uda", "method_decay": 0.9}, "--method-decay 0.9: uda has no such option"),
        ({"temperature": 0.4}, "--temperature 0.4: fixmatch has no such option"),
        ({"temperature": 0.0}, "--temperature must be above 0; found 0.0"),
        ({"method_decay": 1.0}, r"--method-decay is a decay in \[0, 1\), for example 0.999; found 1.0"),
        ({"method": "pseudolabel", "joint_forward": True}, "--joint-forward True: pseudolabel has no such option"),
        ({"device": "warp"}, "--device 'warp' is not usable here .*try cpu"),
        (
            {"ggcr_through_statistics": True, "amp": "fp16"},
            "--ggcr-through-statistics has not been verified in float16",
        ),
        ({"ggcr_through_statistics": True, "arch": "wrn-10-1-gn"}, "--arch wrn-10-1-gn has no BatchNorm; leave it out"),
        ({"ggcr_encoder": "backbone"}, "--ggcr-encoder 'backbone' is a prefix of no parameter: write encoder, all"),
        ({"ggcr_encoder": "backbone", "ggcr_weight": 0.0}, "--ggcr-encoder 'backbone' is a prefix of no parameter"),
        ({"sam_rho": 0.1}, "--sam-rho 0.1: --optimizer sgd has no ball; leave it out"),
        ({"jacobian_projections": 2}, "--jacobian-projections 2: there is no penalty; give --jacobian-weight, too"),
        ({"labels": 33}, "--labels 33 cannot be balanced over 10 classes"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(
    tiny: MakeConfig, changes: dict[str, Any], message: str
) -> None:
    config = tiny(**changes)
    with pytest.raises(OptionError, match=message):
        run(config)
    assert not Path(str(config.output)).exists()
    assert main(config) == 2


@pytest.mark.parametrize("weight", [0.1, 0.0])
def test_what_the_library_refuses_is_one_line_and_status_1(
    tiny: MakeConfig, capsys: pytest.CaptureFixture[str], weight: float
) -> None:
    config = tiny(ggcr_engine="warp", ggcr_weight=weight)
    with pytest.raises(GradConsistError, match="engine"):
        run(config)
    assert main(config) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not Path(str(config.output)).exists()


def test_cifar_without_a_network_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", offline)
    config = resolve(parse("--data-dir", str(tmp_path)))
    with pytest.raises(DatasetError, match=r"--dataset cifar10 is neither in --data-dir .*put cifar-10-python.tar.gz"):
        load_images(config)


def test_digits_hold_out_a_fixed_fifth() -> None:
    images = load_images(resolve(parse("--preset", "demo")))
    assert images.train_x.shape == (1442, 8, 8, 3)
    assert images.test_x.shape == (355, 8, 8, 3)
    assert not images.flip
    assert images.train_x.max() == 255
