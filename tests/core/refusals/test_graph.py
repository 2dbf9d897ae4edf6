"""Graphs that would give a number without a part of the gradient: each is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradconsist import GradientConsistencyLoss
from gradconsist.errors import ConfigError, UnsupportedModuleError
from support.models import SquareOnce
from support.nets import Layers, net, views


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost", "auto"])
def test_a_function_without_a_second_derivative_is_refused(engine: str, fused: bool) -> None:
    # torch.autograd.grad for named parameters does not run the node that would raise: it just misses a part.
    gc = GradientConsistencyLoss(net(lambda net, x: SquareOnce.apply(net.stem(x))), engine=engine, fused=fused)
    with pytest.raises(UnsupportedModuleError, match="without a second derivative"):
        gc(*views())


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_so_is_one_at_the_end_below_a_loss_that_is_linear_in_it(engine: str) -> None:
    # There torch leaves not even such a node, unless what comes from above has a graph.
    model = Layers(lambda model, x: SquareOnce.apply(model.net(x)), net=net())
    gc = GradientConsistencyLoss(model, engine=engine, loss_fn=lambda output, target: output.sum(1))
    with pytest.raises(UnsupportedModuleError, match="without a second derivative"):
        gc(*views())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of forwards under no_grad
@pytest.mark.parametrize("encoder", [None, "block"])
@pytest.mark.parametrize("frozen_stem", [True, False])
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost", "auto"])
def test_reentrant_checkpointing_is_refused(engine: str, frozen_stem: bool, encoder: str | None) -> None:
    model = net(lambda net, x: checkpoint(net.block, net.stem(x), use_reentrant=True), block=nn.Linear(6, 6))
    # With encoder="block" no compared parameter lies before the checkpoint: torch itself says nothing there.
    model.stem.weight.requires_grad_(not frozen_stem)
    named = (lambda name: name.startswith("block")) if encoder else None
    gc = GradientConsistencyLoss(model, engine=engine, encoder=named)
    with pytest.raises(UnsupportedModuleError, match="use_reentrant=False"):
        gc(*views())


def test_a_learnable_loss_needs_an_ordinary_graph() -> None:
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def tempered(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output / temperature, target, reduction="none")

    model = net()
    with pytest.raises(ConfigError, match="`fused=False`"):
        GradientConsistencyLoss(model, loss_fn=tempered)(*views())
    GradientConsistencyLoss(model, loss_fn=tempered, fused=False)(*views()).backward()
    assert temperature.grad is not None
    assert temperature.grad != 0
