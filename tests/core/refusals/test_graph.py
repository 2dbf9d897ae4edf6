"""Graphs that would give a number without a part of the gradient: each is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradconsist import GradientConsistencyLoss
from gradconsist.errors import ConfigError, UnsupportedModuleError
from support.models import SquareOnce


class _Net(nn.Module):
    """Stem, a middle part that a subclass chooses, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.block = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def middle(self, x: Tensor) -> Tensor:
        return self.block(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)))


class _OnceDifferentiable(_Net):
    def middle(self, x: Tensor) -> Tensor:
        return SquareOnce.apply(self.block(x))


class _OnceAtTheEnd(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return SquareOnce.apply(super().forward(x))


class _Checkpointed(_Net):
    reentrant = True

    def middle(self, x: Tensor) -> Tensor:
        return checkpoint(super().middle, x, use_reentrant=self.reentrant)


def _views() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weak = torch.randn(4, 6, dtype=torch.float64)
    return weak, weak + 0.2 * torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost", "auto"])
def test_a_function_without_a_second_derivative_is_refused(engine: str, fused: bool) -> None:
    # torch.autograd.grad for named parameters does not run the node that would raise: it just misses a part.
    gc = GradientConsistencyLoss(_OnceDifferentiable().double(), engine=engine, fused=fused)
    with pytest.raises(UnsupportedModuleError, match="without a second derivative"):
        gc(*_views())


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_so_is_one_at_the_end_below_a_loss_that_is_linear_in_it(engine: str) -> None:
    # There torch leaves not even such a node, unless what comes from above has a graph.
    model = _OnceAtTheEnd().double()
    gc = GradientConsistencyLoss(model, engine=engine, loss_fn=lambda output, target: output.sum(1))
    with pytest.raises(UnsupportedModuleError, match="without a second derivative"):
        gc(*_views())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of forwards under no_grad
@pytest.mark.parametrize("encoder", [None, "block"])
@pytest.mark.parametrize("frozen_stem", [True, False])
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost", "auto"])
def test_reentrant_checkpointing_is_refused(engine: str, frozen_stem: bool, encoder: str | None) -> None:
    model = _Checkpointed().double()
    # With encoder="block" no compared parameter lies before the checkpoint: torch itself says nothing there.
    model.stem.weight.requires_grad_(not frozen_stem)
    named = (lambda name: name.startswith("block")) if encoder else None
    gc = GradientConsistencyLoss(model, engine=engine, encoder=named)
    with pytest.raises(UnsupportedModuleError, match="use_reentrant=False"):
        gc(*_views())


def test_non_reentrant_checkpointing_is_exact() -> None:
    plain, checkpointed = _Net().double(), _Checkpointed().double()
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.reentrant = False
    for model in (plain, checkpointed):
        GradientConsistencyLoss(model, engine="loop")(*_views()).backward()
    for (name, expected), found in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert expected.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=0, msg=name)


def test_a_learnable_loss_needs_an_ordinary_graph() -> None:
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def tempered(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output / temperature, target, reduction="none")

    model = _Net().double()
    with pytest.raises(ConfigError, match="`fused=False`"):
        GradientConsistencyLoss(model, loss_fn=tempered)(*_views())
    GradientConsistencyLoss(model, loss_fn=tempered, fused=False)(*_views()).backward()
    assert temperature.grad is not None
    assert temperature.grad != 0
