"""SAM against algorithm 1 of its paper written in NumPy, and the loops that it must fit into."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist.errors import ConfigError, StateError
from gradconsist.optim import SAM, kept_running_statistics
from support.sam import arrays, data, network, numpy_sam


def closure(sam: SAM, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    def evaluate() -> Tensor:
        sam.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return evaluate


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("by_parts", [False, True])
def test_six_steps_with_groups(by_parts: bool, adaptive: bool) -> None:
    model, batches = network(), [data(seed) for seed in range(6)]
    start = arrays(model)
    groups = [
        {"params": model[0].parameters(), "lr": 0.2, "rho": 0.3},
        {"params": model[2].parameters()},
    ]
    sam = SAM(torch.optim.SGD(groups, lr=0.1, momentum=0.9), rho=0.05, adaptive=adaptive)
    for batch in batches:
        evaluate = closure(sam, model, batch)
        if by_parts:
            evaluate()
            sam.first_step()
            evaluate()
            sam.second_step()
        else:
            sam.step(evaluate)
    expected = numpy_sam(start, batches, [0.3, 0.3, 0.05, 0.05], [0.2, 0.2, 0.1, 0.1], adaptive=adaptive)
    for found, wanted in zip(arrays(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-13)


def test_the_loss_returned_is_that_of_the_weights_themselves() -> None:
    model, batch = network(), data()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
    before = F.cross_entropy(model(batch[0]), batch[1])
    assert sam.step(closure(sam, model, batch)).item() == before.item()


def test_to_maximise_is_to_minimise_the_negative() -> None:
    batch = data()

    def stepped(sign: float) -> list[Any]:
        model = network()
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1, maximize=sign < 0), rho=0.5)

        def evaluate() -> None:
            sam.zero_grad()
            (sign * F.cross_entropy(model(batch[0]), batch[1])).backward()

        sam.step(evaluate)
        return arrays(model)

    for found, wanted in zip(stepped(-1.0), stepped(1.0), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_the_ball_of_radius_zero_is_the_base_optimizer() -> None:
    plain, flat, batch = network(), network(), data()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    sam = SAM(torch.optim.Adam(flat.parameters(), lr=0.1), rho=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(batch[0]), batch[1]).backward()
        optimizer.step()
        sam.step(closure(sam, flat, batch))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), flat.parameters(), strict=True))


def test_the_weights_come_back_bitwise_and_the_norm_is_returned() -> None:
    model, batch = network().float(), (data()[0].float(), data()[1])
    before = arrays(model)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.7)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    flat = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    norm = sam.first_step()
    torch.testing.assert_close(norm, flat.norm())
    moved = np.concatenate([(a - b).ravel() for a, b in zip(arrays(model), before, strict=True)])
    assert abs(np.linalg.norm(moved) - 0.7) < 1e-6
    assert sam.perturbed
    sam.restore()
    assert not sam.perturbed
    assert all(np.array_equal(a, b) for a, b in zip(arrays(model), before, strict=True))


@pytest.mark.parametrize("what", ["zero", "nan", "none"])
def test_no_direction_is_no_perturbation(what: str) -> None:
    model = network()
    before = arrays(model)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    for p in model.parameters():
        p.grad = None if what == "none" else torch.full_like(p, 0.0 if what == "zero" else torch.nan)
    sam.first_step()
    assert not sam.perturbed
    assert all(np.array_equal(a, b) for a, b in zip(arrays(model), before, strict=True))
    sam.second_step()
    assert all(np.array_equal(a, b) for a, b in zip(arrays(model), before, strict=True))


def test_parameters_without_a_gradient_stay_and_sparse_ones_move_alike() -> None:
    def run(sparse: bool) -> Tensor:
        torch.manual_seed(0)
        table, spare = nn.Embedding(6, 3, sparse=sparse), nn.Parameter(torch.ones(2))
        before = table.weight.detach().clone()
        sam = SAM(torch.optim.SGD([*table.parameters(), spare], lr=0.1), rho=0.5)
        table(torch.tensor([0, 2, 2])).square().sum().backward()
        sam.first_step()
        moved = table.weight.detach() - before
        assert torch.equal(spare, torch.ones(2))
        table(torch.tensor([0, 2, 2])).square().sum().backward()
        sam.second_step()
        assert bool((moved[[1, 3, 4, 5]] == 0).all())
        assert abs(float(moved.norm()) - 0.5) < 1e-6
        return table.weight.detach()

    torch.testing.assert_close(run(True), run(False))


def test_a_resumed_run_is_bitwise_equal() -> None:
    batches = [data(seed) for seed in range(4)]

    def build() -> tuple[nn.Module, SAM]:
        model = network()
        return model, SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2)

    model, sam = build()
    for batch in batches[:2]:
        sam.step(closure(sam, model, batch))
    state, copied = copy.deepcopy((model.state_dict(), sam.state_dict())), copy.deepcopy((model, sam))
    other, second = build()
    second.param_groups[0]["rho"] = 9.0  # overwritten by the state
    other.load_state_dict(state[0])
    second.load_state_dict(state[1])
    assert second.param_groups is second.base.param_groups
    for m, s in ((model, sam), (other, second), copied):
        for batch in batches[2:]:
            s.step(closure(s, m, batch))
    for again in (other, copied[0]):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_schedulers_and_new_groups_reach_the_base() -> None:
    model = network()
    sam = SAM(torch.optim.SGD(model[0].parameters(), lr=0.4), rho=0.2)
    sam.add_param_group({"params": model[2].parameters(), "rho": 0.3})
    assert [group["rho"] for group in sam.base.param_groups] == [0.2, 0.3]
    for optimizer in (sam, sam.base):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        sam.step(closure(sam, model, data()))
        scheduler.step()
    assert sam.base.param_groups[1]["lr"] == 0.1


class Scaled:
    """Steps under a GradScaler, as the class's page shows them."""

    def __init__(self, scale: float) -> None:
        self.model = network().float()
        self.sam = SAM(torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9), rho=0.2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def __call__(self, batch: tuple[Tensor, Tensor], *, overflow: bool = False) -> None:
        x, y = batch[0].float(), batch[1]
        self.sam.zero_grad()
        self.scaler.scale(F.cross_entropy(self.model(x), y)).backward()
        self.sam.first_step()
        self.scaler.scale(F.cross_entropy(self.model(x), y)).backward()
        if overflow:
            self.model[0].weight.grad.fill_(torch.inf)
        self.sam.restore()
        self.scaler.step(self.sam.base)
        self.scaler.update()


def test_grad_scaler() -> None:
    scaled, plain = Scaled(1024.0), network().float()
    sam = SAM(torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), rho=0.2)
    for seed in range(3):
        scaled(data(seed))
        sam.step(closure(sam, plain, (data(seed)[0].float(), data(seed)[1])))
    for a, b in zip(scaled.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    before = arrays(scaled.model)
    scaled(data(9), overflow=True)  # the scaler skips the step, and the weights are back
    assert all(np.array_equal(a, b) for a, b in zip(arrays(scaled.model), before, strict=True))
    assert scaled.scaler.get_scale() == 512.0


# -- running statistics ------------------------------------------------------------------------------------------------


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("given", [True, False])
def test_running_statistics_are_those_of_the_first_forward(given: bool) -> None:
    model, batch, reference = normalised(), data(), normalised()
    reference(batch[0])
    buffers = [(id(b), b) for b in model.buffers()]
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model if given else None)
    sam.step(closure(sam, model, batch))
    same = [torch.equal(a, b) for a, b in zip(model.buffers(), reference.buffers(), strict=True)]
    assert all(same) if given else not any(same)
    assert [id(b) for b in model.buffers()] == [key for key, _ in buffers]


def test_kept_running_statistics_leaves_the_forward_and_the_gradient_alone() -> None:
    model, plain, batch = normalised(), normalised(), data()
    before = copy.deepcopy(dict(model.named_buffers()))
    with kept_running_statistics(model):
        kept = F.cross_entropy(model(batch[0]), batch[1])
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    kept.backward()
    F.cross_entropy(plain(batch[0]), batch[1]).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_what_is_no_base_optimizer() -> None:
    model = network()
    with pytest.raises(ConfigError, match=r"`base` is .*pass an optimizer"):
        SAM(model.parameters())
    with pytest.raises(ConfigError, match=r"`base` is .*LBFGS"):
        SAM(torch.optim.LBFGS(model.parameters()))


def test_steps_in_the_wrong_order() -> None:
    model = network()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="needs a closure"):
        sam.step()
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    sam.first_step()
    with pytest.raises(ConfigError, match="`first_step` was called twice"):
        sam.first_step()
    with pytest.raises(StateError, match="the weights are perturbed"):
        sam.state_dict()
    sam.restore()
    with pytest.raises(StateError, match="groups without 'rho' and 'adaptive'"):
        sam.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict() | {"param_groups": [{"lr": 1}]})


def test_a_failure_in_the_second_pass_puts_the_weights_back() -> None:
    model, calls = network(), []
    before = arrays(model)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)

    def evaluate() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("seen in a test")
        return closure(sam, model, data())()

    with pytest.raises(RuntimeError, match="seen in a test"):
        sam.step(evaluate)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(model), before, strict=True))
    assert not sam.perturbed


def test_the_base_optimizer_may_be_used_directly() -> None:
    """Its groups and state are SAM's own, also after it has loaded a state or taken a group."""
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    base = torch.optim.SGD([first], lr=0.1)
    sam = SAM(base, rho=0.05)
    base.load_state_dict(base.state_dict())
    base.add_param_group({"params": [second]})
    assert sam.param_groups is base.param_groups
    assert sam.state is base.state
    (first.square().sum() + second.square().sum()).backward()
    sam.first_step()
    assert not torch.equal(second, torch.ones(2))
    sam.second_step()
    for group in sam.param_groups:
        group["lr"] = 0.0
    before = first.detach().clone()
    first.grad = torch.ones(2)
    base.step()
    assert torch.equal(first, before)


def test_an_error_while_the_weights_are_moved_puts_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    sam = SAM(torch.optim.SGD(parameters, lr=0.1))
    moved: list[Tensor] = []
    real = Tensor.add_

    def fails(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        if any(self is parameter for parameter in parameters):
            if moved:
                raise RuntimeError("planted")
            moved.append(self)
        return real(self, *args, **kwargs)

    def closure() -> Tensor:
        sam.zero_grad()
        loss = sum(parameter.square().sum() for parameter in parameters)
        loss.backward()
        return loss

    monkeypatch.setattr(Tensor, "add_", fails)
    with pytest.raises(RuntimeError, match="planted"):
        sam.step(closure)
    assert not sam.perturbed
    assert all(torch.equal(parameter, torch.ones(2)) for parameter in parameters)
