from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from trainer.errors import OptionError
from trainer.models import build_model
from trainer.optimizer import AveragedModel, build_optimizer, cosine_factor, set_learning_rate


@pytest.mark.parametrize(
    ("arch", "classes", "parameters"),
    [("wrn-28-2", 10, 1_467_610), ("wrn-28-8", 100, 23_401_012), ("wrn-10-1", 10, 77_850)],
)
def test_wide_resnets_have_the_published_size(arch: str, classes: int, parameters: int) -> None:
    # 1.5 M for WRN-28-2 on CIFAR-10 and 23.4 M for WRN-28-8 on CIFAR-100, as the papers print them.
    with torch.device("meta"):
        model = build_model(arch, classes, momentum=0.1)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("side", [8, 32])
def test_logits_are_the_head_of_the_encoder(side: int) -> None:
    model = build_model("wrn-16-1", 7, momentum=0.1)
    x = torch.randn(2, 3, side, side)
    assert model.encoder(x).shape == (2, 64)
    assert torch.equal(model.eval()(x), model.head(model.encoder(x)))
    inside = {id(p) for p in model.encoder.parameters()} | {id(p) for p in model.head.parameters()}
    assert inside == {id(p) for p in model.parameters()}


def test_momentum_reaches_every_batchnorm() -> None:
    norms = [m for m in build_model("wrn-10-2", 3, momentum=0.007).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 7
    assert {norm.momentum for norm in norms} == {0.007}


def test_group_norm_takes_the_place_of_every_batchnorm() -> None:
    torch.manual_seed(0)
    batch = build_model("wrn-10-2", 3, momentum=0.1)
    torch.manual_seed(0)
    group = build_model("wrn-10-2-gn", 3, momentum=0.1)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in group.modules())
    norms = [module for module in group.modules() if isinstance(module, nn.GroupNorm)]
    assert [(norm.num_groups, norm.num_channels) for norm in norms[:3]] == [(2, 16), (4, 32), (4, 32)]
    assert len(norms) == 7
    # The same weights by name, and an output that knows no batch.
    assert all(torch.equal(value, dict(batch.named_parameters())[name]) for name, value in group.named_parameters())
    x = torch.randn(4, 3, 16, 16)
    assert torch.allclose(group(x)[:1], group(x[:1]), atol=1e-5)


@pytest.mark.parametrize("arch", ["wrn-11-1", "wrn-4-1", "wrn-10-0"])
def test_impossible_sizes_are_refused(arch: str) -> None:
    with pytest.raises(OptionError, match=rf"--arch '{arch}': the depth must be 10, 16, 22"):
        build_model(arch, 10, momentum=0.1)


@pytest.mark.parametrize("arch", ["wrn-28", "WRN-28-2", "wrn-28-2x", "wrn-28-2-bn", "wrn_28_2"])
def test_unknown_architectures_are_refused(arch: str) -> None:
    with pytest.raises(OptionError, match=r"--arch .* is unknown: write wrn-DEPTH-WIDTH, for example wrn-28-2, or"):
        build_model(arch, 10, momentum=0.1)


def test_lr_is_seven_sixteenths_of_a_cosine() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, lr=0.03, weight_decay=5e-4)
    assert set_learning_rate(optimizer, 0.03, 0, 1000) == 0.03
    assert set_learning_rate(optimizer, 0.03, 500, 1000) == pytest.approx(0.03 * 0.7730104533627370)
    assert set_learning_rate(optimizer, 0.03, 1000, 1000) == pytest.approx(0.03 * 0.19509032201612825)
    assert [group["lr"] for group in optimizer.param_groups] == [0.03 * math.cos(7 * math.pi / 16)] * 2
    assert cosine_factor(1000, 1000) > 0


def test_weight_decay_is_on_kernels_only() -> None:
    model = build_model("wrn-16-2", 10, momentum=0.1)
    decayed, others = build_optimizer(model, lr=0.03, weight_decay=5e-4).param_groups
    assert decayed["weight_decay"] == 5e-4
    assert others["weight_decay"] == 0
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in (decayed, others))
    kernels = {p for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in [m.weight]}
    assert set(decayed["params"]) == kernels
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def moved(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.add_(1)
    return other


def test_ema_averages_parameters_and_statistics() -> None:
    start = build_model("wrn-10-1", 3, momentum=0.1)
    live, average = moved(start), AveragedModel(start, 0.9, warmup=False)
    average.update(live)
    average.update(live)
    for before, mine in zip(start.parameters(), average.model.parameters(), strict=True):
        assert torch.allclose(mine, before + (1 - 0.9**2), atol=1e-6)
        assert not mine.requires_grad
    for before, theirs, mine in zip(start.buffers(), live.buffers(), average.model.buffers(), strict=True):
        expected = before + (1 - 0.9**2) if before.is_floating_point() else theirs
        assert torch.allclose(mine, expected, atol=1e-6), "statistics go with their weights; counts are copied"
    assert not average.model.training


def test_ema_warmup_starts_with_a_small_decay() -> None:
    start = nn.Linear(2, 2)
    average = AveragedModel(start, 0.999, warmup=True)
    average.update(moved(start))
    assert torch.allclose(average.model.weight, start.weight + 0.9)  # decay (1 + 0) / (10 + 0)
    average.update(moved(start))
    assert torch.allclose(average.model.weight, start.weight + 1 - 0.1 * 2 / 11)


def test_ema_decay_0_follows_exactly() -> None:
    start = nn.Linear(3, 3)
    live, average = moved(start), AveragedModel(start, 0.0, warmup=False)
    average.update(live)
    assert torch.equal(average.model.weight, live.weight)


def test_ema_state_round_trip() -> None:
    start = nn.Linear(2, 2)
    average = AveragedModel(start, 0.999, warmup=True)
    average.update(moved(start))
    other = AveragedModel(nn.Linear(2, 2), 0.999, warmup=True)
    other.load_state_dict(average.state_dict())
    assert other.updates == 1
    assert torch.equal(other.model.weight, average.model.weight)
