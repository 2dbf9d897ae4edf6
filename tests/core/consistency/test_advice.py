"""A term that can be computed and does nothing: one warning each, or a refusal."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss
from gradconsist.errors import LossContractError
from support.models import Layers


def network(*head: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), *head).double()


def views() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    weak = torch.randn(5, 6, generator=g).double()
    return weak, weak + 0.5 * torch.randn(5, 6, generator=g), torch.tensor([0, 1, 2, 0, 1])


def cut(where: str) -> Any:
    """`where` says what is detached."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.stem(x))
        h = torch.tanh(m.body(h.detach() if where == "stem" else h))
        return m.head(h.detach() if where == "body" else h)

    return Layers(forward, stem=network()[0], body=nn.Linear(8, 8).double(), head=network()[2])


def own_prediction(model: nn.Module) -> Callable[[], Any]:
    weak, strong, _ = views()
    gc = GradientConsistencyLoss(model)
    return lambda: gc(weak, strong, model(weak).softmax(1).detach())


def flat(model: nn.Module) -> Callable[[], Any]:
    gc = GradientConsistencyLoss(model, min_norm=1e6)
    return lambda: gc(*views())


def plain(model: nn.Module, **options: Any) -> Callable[[], Any]:
    gc = GradientConsistencyLoss(model, **options)
    return lambda: gc(*views())


def equal(model: nn.Module) -> Callable[[], Any]:
    gc = GradientConsistencyLoss(model)
    weak, _, target = views()
    return lambda: gc(weak, weak.clone(), target)


#: What is done, the call after which it is told, and words of the warning.
WARNINGS = {
    "own softmax as soft target": (lambda: own_prediction(network()), 1, "own prediction of the weak view.*argmax"),
    "every pair degenerate": (lambda: flat(network()), 3, r"last 3 call\(s\) was degenerate.*at most 1e\+06.*min_norm"),
    "softmax in the model": (lambda: plain(network(nn.Softmax(1))), 1, "looks like probabilities.*take the softmax"),
    "a part of the encoder cut off": (lambda: plain((model := cut("stem")), encoder=[model.stem, model.body]), 1,
        r"does not depend on 2 of 4 compared parameters.*stem.weight, stem.bias.*detach"),
    "one view twice": (lambda: equal(network()), 1, "`weak` and `strong` hold the same numbers.*two augmentations"),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNINGS)
def test_it_is_told_once_with_a_remedy(name: str, caplog: pytest.LogCaptureFixture) -> None:
    build, call, words = WARNINGS[name]
    run = build()
    with caplog.at_level(logging.WARNING, "gradconsist"):
        for number in range(1, 8):
            run()
            assert len(caplog.records) == (number >= call), number
    assert caplog.records[0].levelno == logging.WARNING
    text = caplog.records[0].getMessage()
    assert re.search(words, text), text


def test_nothing_is_told_of_a_term_that_works(caplog: pytest.LogCaptureFixture) -> None:
    """Some degenerate pairs, a call without a pair, soft targets, and monitoring in between."""
    weak, strong, target = views()
    gc = GradientConsistencyLoss(network())
    soft = torch.nn.functional.one_hot(target, 3).double()
    mixed = soft.clone()
    mixed[:4] = network()(weak)[:4].softmax(1).detach()
    for _ in range(4):
        gc(weak, strong, mixed)
        gc(weak, strong, target, torch.zeros(5))
        gc.measure(weak, strong, network()(weak).softmax(1).detach())
    assert not caplog.records


@pytest.mark.parametrize("encoder", ["stem", "body"])
def test_a_loss_that_no_compared_parameter_reaches_is_refused(encoder: str) -> None:
    model = cut(encoder)
    gc = GradientConsistencyLoss(model, encoder=getattr(model, encoder))
    with pytest.raises(LossContractError, match=rf"none of the 2 compared parameters \('{encoder}.weight', ...\)"):
        gc(*views())


# -- a loss that is used twice -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, torch.zeros(5)], ids=["pairs", "no pair"])
def test_a_second_backward_raises_unless_the_graph_is_kept(weight: Tensor | None) -> None:
    model = network()
    parameters = list(model.parameters())
    loss = GradientConsistencyLoss(model)(*views(), weight)
    first = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    loss.backward()
    for parameter, gradient in zip(parameters, first, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    for again in (loss.backward, lambda: torch.autograd.grad(loss, parameters), lambda: (2 * loss).backward()):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            again()
