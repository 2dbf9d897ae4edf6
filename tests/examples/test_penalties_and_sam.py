"""Gradient norm penalty, Jacobian penalty and SAM in the trainer: they act, they resume, and SAM's is one step."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import StepOutput
from gradconsist.optim import SAM
from gradconsist.regularizers import GradientNormPenalty
from support.runs import MakeConfig, differing, final, trained, unequal
from trainer.config import method_label, resolve
from trainer.errors import OptionError
from trainer.methods import build_method
from trainer.models import build_model
from trainer.optimizer import same_step_twice
from trainer.training import run

ALL = {"optimizer": "sam", "sam_rho": 0.1, "jacobian_weight": 0.1, "ggcr_criterion": "gradient-norm"}


def test_everything_at_once_resumes_bitwise(tiny: MakeConfig) -> None:
    whole, parts = tiny("whole", steps=5, **ALL), tiny("parts", steps=5, **ALL)
    assert run(whole) == 0
    assert run(dataclasses.replace(parts, stop_after_steps=3)) == 0
    assert run(parts) == 0
    assert differing(str(whole.output), str(parts.output)) == []
    assert final(str(whole.output))[".optimizer.param_groups.0.rho"] == 0.1


@pytest.mark.parametrize(
    "changes", [{"optimizer": "sam"}, {"jacobian_weight": 0.1}, {"ggcr_criterion": "gradient-norm"}]
)
def test_each_acts(tiny: MakeConfig, changes: dict[str, Any]) -> None:
    saved = []
    for name, options in (("plain", {}), ("changed", changes)):
        config = tiny(name, steps=4, eval_every=4, **options)
        state = final(trained(config))
        saved.append({key: value for key, value in state.items() if key.startswith(".average.model.")})
    assert unequal(*saved) != []
    assert all(bool(torch.isfinite(value).all()) for value in saved[1].values())


def test_names_and_refusals(tiny: MakeConfig) -> None:
    assert method_label(tiny(**ALL)) == "fixmatch+gradient-norm+jacobian+sam"
    assert method_label(tiny()) == "fixmatch+ggcr"
    model = build_model("wrn-10-1", 10, momentum=0.1)
    method = build_method(model, resolve(tiny(ggcr_criterion="gradient-norm")))
    assert isinstance(method.consistency, GradientNormPenalty)
    for options, message in (
        ({"sam_rho": 0.0}, "--sam-rho must be above 0"),
        ({"jacobian_weight": -1.0}, "--jacobian-weight must be 0 or more"),
        ({"jacobian_projections": 0}, "--jacobian-projections must be above 0"),
    ):
        with pytest.raises(OptionError, match=message):
            resolve(tiny(**options))


class Remembering(nn.Module):
    """BatchNorm, dropout, a step counter that weights the loss, and a memory of the last output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
        self.register_buffer("memory", torch.zeros(8, 3))
        self.step = 0

    def forward(self, x: Tensor, y: Tensor) -> StepOutput:
        z = self.net(x)
        loss = F.cross_entropy(z, y) * (1 + self.step) + (z - self.memory).square().mean()
        self.memory = 0.5 * self.memory + 0.5 * z.detach()
        self.step += 1
        return StepOutput(loss)

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_second_pass_is_the_same_step_at_other_weights(fails: bool) -> None:
    x, y = torch.randn(8, 4), torch.randint(3, [8])
    method = Remembering()
    once = copy.deepcopy(method)
    sam = SAM(torch.optim.SGD(method.parameters(), lr=0.1), rho=0.3)
    seen: list[Tensor] = []

    def gradient() -> StepOutput:
        if fails and seen:
            raise RuntimeError("seen in a test")
        sam.zero_grad()
        out = method(x, y)
        out.loss.backward()
        seen.append(out.loss.detach())
        return out

    torch.manual_seed(1)
    if fails:
        with pytest.raises(RuntimeError, match="seen in a test"):
            same_step_twice(method, sam, gradient)
    else:
        same_step_twice(method, sam, gradient)
    after = torch.get_rng_state()
    # By hand: one pass for what is remembered, one at the moved weights from the same start.
    moved = copy.deepcopy(once)
    torch.manual_seed(1)
    once(x, y).loss.backward()
    assert torch.equal(after, torch.get_rng_state())
    assert unequal(dict(method.state_dict()), dict(once.state_dict())) == []
    if fails:
        return
    norm = torch.cat([p.grad.reshape(-1) for p in once.parameters() if p.grad is not None]).norm()
    with torch.no_grad():
        for p, q in zip(moved.parameters(), once.parameters(), strict=True):
            p += 0.3 * q.grad / norm
    torch.manual_seed(1)
    second = moved(x, y)
    second.loss.backward()
    torch.testing.assert_close(seen[1], second.loss.detach())
    for p, q in zip(method.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
