"""benchmarks/evidence/term_dynamics.py: its gradients are those of the losses, and looking changes no run."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pages import program
from torch import Tensor

from support.runs import stepped
from trainer.grid import build_grid
from trainer.loader import StepImages
from trainer.step import Trainer


@pytest.fixture(scope="module")
def dynamics() -> ModuleType:
    return program("benchmarks/evidence/term_dynamics")


@pytest.fixture
def run() -> tuple[Trainer, StepImages]:
    """A run of the smallest budget after two steps, and its third batch."""
    grid = build_grid(Path("unused"), "smoke", ["lambda"], 1, ["--joint-forward", "False", "--unlabeled-ramp", "0"])
    config = next(cell.config for cell in grid.cells if cell.variant == "ggcr")
    trainer, dataset = stepped(config, 2)
    return trainer, dataset[2]


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_looking_changes_nothing(dynamics: ModuleType, run: tuple[Trainer, StepImages]) -> None:
    trainer, images = run
    before = copy.deepcopy(trainer.state_dict())
    dynamics.look(trainer, images)
    after = trainer.state_dict()
    for part in ("method", "average"):
        tensors = [{k: v for k, v in state[part].items() if isinstance(v, Tensor)} for state in (before, after)]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert torch.equal(before["processes"]["rng"], after["processes"]["rng"])
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in trainer.model.parameters())


def test_the_gradients_are_those_of_the_losses(dynamics: ModuleType, run: tuple[Trainer, StepImages]) -> None:
    """L_s and L_u written out; GC of each pair from two gradients of one sample each, at the same statistics."""
    trainer, images = run
    found = dynamics.look(trainer, images)
    batch = trainer.to_model.batch(images)
    model: Any = copy.deepcopy(trainer.model)
    logits = model(torch.cat([batch.x, batch.strong]))
    weak = copy.deepcopy(trainer.model)(batch.weak).softmax(1)
    confident = (weak.max(1).values >= trainer.config.threshold).float()
    parameters = list(model.parameters())
    supervised = F.cross_entropy(logits[: len(batch.x)], batch.y)
    losses = F.cross_entropy(logits[len(batch.x) :], weak.argmax(1), reduction="none")
    gradient_s = flat(torch.autograd.grad(supervised, parameters, retain_graph=True))
    gradient_u = flat(torch.autograd.grad((confident * losses).mean(), parameters))
    assert found["mask"] == pytest.approx(float(confident.mean()))
    assert found["norm_s"] == pytest.approx(float(gradient_s.norm()), rel=1e-4)
    assert found["norm_u"] == pytest.approx(float(gradient_u.norm()), rel=1e-3)

    frozen: Any = copy.deepcopy(trainer.model)
    norms = [module for module in frozen.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    seen: dict[torch.nn.Module, Tensor] = {}
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]}))
    with torch.no_grad():
        frozen(torch.cat([batch.weak, batch.strong]))
        for norm in norms:  # the joint statistics of both views, as constants
            norm.running_mean = seen[norm].mean((0, 2, 3))
            norm.running_var = seen[norm].var((0, 2, 3), unbiased=False)
    frozen.eval()
    compared = [p for name, p in frozen.named_parameters() if not name.startswith("head.")]
    cosines = []
    for index in range(len(batch.weak)):
        sides = [
            flat(
                torch.autograd.grad(
                    F.cross_entropy(frozen(view[index : index + 1]), weak.argmax(1)[index : index + 1]), compared
                )
            )
            for view in (batch.weak, batch.strong)
        ]
        cosines.append(float(F.cosine_similarity(*sides, dim=0)))
    assert found["cosine_all"] == pytest.approx(sum(cosines) / len(cosines), abs=2e-3)


def test_medians_by_hand(dynamics: ModuleType) -> None:
    rows = [
        {"variant": "ggcr", "seed": seed, "step": step, "ratio": value}
        for seed, step, value in ((0, 0, 1.0), (1, 0, 3.0), (0, 1, math.nan), (1, 1, 5.0), (0, 2, 7.0), (0, 3, 9.0))
    ]
    found = dynamics.summary(rows)
    assert [row["ratio"] for row in found] == [2.0, 5.0, 7.0, 9.0]
    assert [row["looks"] for row in found] == [2, 2, 1, 1]
