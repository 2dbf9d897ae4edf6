"""P10 where a random model does not lead: what pairs of weight 0 hold decides nothing, not even a refusal."""

from __future__ import annotations

import pytest
import torch

from gradconsist import GradientConsistencyLoss
from gradconsist.errors import NonFiniteError, UnsupportedModuleError
from support import compare
from support.nets import Net, net
from support.zoo import CASES

ENGINES = pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])


def _mixes_samples() -> Net:
    """A sample's output depends on its neighbours, which must be refused."""
    return net(lambda net, x: net.stem(x) - 0.5 * net.stem(x).mean(0, keepdim=True))


@ENGINES
def test_p10_nan_in_a_masked_pair_does_not_hide_that_a_model_mixes_samples(engine: str) -> None:
    """The model is tried on a pair of the call, once: on one that is compared."""
    p = CASES["mlp"].problem()
    model = _mixes_samples()
    gc = GradientConsistencyLoss(model, engine=engine)
    p.weak[0] = torch.nan
    with pytest.raises(UnsupportedModuleError, match="changes with the other samples"):
        gc(*p.views, torch.tensor([0.0, 1, 1, 1, 1]))


@ENGINES
def test_a_step_with_nan_settles_nothing_about_the_model(engine: str) -> None:
    """It is refused as such, and the next step finds the model to mix samples."""
    p = CASES["mlp"].problem()
    gc = GradientConsistencyLoss(_mixes_samples(), engine=engine)
    broken = torch.full_like(p.weak, torch.nan)
    with pytest.raises(NonFiniteError, match="weak"):
        gc(broken, broken, p.target)
    with pytest.raises(UnsupportedModuleError, match="changes with the other samples"):
        gc(*p.views)


@ENGINES
def test_p10_nan_in_a_masked_pair_is_not_blamed_for_an_overflow_in_float16(engine: str) -> None:
    """Under float16 autocast an overflowing pair is left out and counted; the others' value is that without it."""
    p = CASES["mlp"].problem(dtype=torch.float32)
    p.strong[2] *= 1e6
    gc = GradientConsistencyLoss(p.model, engine=engine)
    weight = torch.tensor([1.0, 1, 1, 1, 0])
    with torch.autocast("cpu", dtype=torch.float16):
        first = gc(*p.views, weight)
        assert gc.last.degenerate.tolist() == [False, False, True, False, False]
        p.weak[4] = torch.nan
        second = gc(*p.views, weight)
    gradients = [compare.gradient_of(loss, p.model) for loss in (first, second)]
    assert torch.equal(first, second)
    assert torch.equal(*gradients)
    p.weak[0] = torch.nan
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(NonFiniteError, match="`weak` has such entries"):
        gc(*p.views, weight)


@ENGINES
def test_p10_unknown_tokens_in_a_masked_pair(engine: str) -> None:
    """The number of pairs at a time is found out on a pair that is compared."""
    p = CASES["tied_embedding"].problem()
    weight = torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64)
    first = GradientConsistencyLoss(p.model, engine=engine)(*p.views, weight)
    p.weak[0] = 10**6
    assert torch.equal(GradientConsistencyLoss(p.model, engine=engine)(*p.views, weight), first)
