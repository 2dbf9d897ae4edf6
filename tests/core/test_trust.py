"""What must not go wrong in silence, and was found to by reading: refusals that last, aliases, hooks, retries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist.diagnostics import sharpness
from gradconsist.engines import GradProducts, LoopEngine, Problem
from gradconsist.errors import (
    ConfigError,
    LossContractError,
    ModelError,
    NonFiniteError,
    StateError,
    UnsupportedModuleError,
)
from gradconsist.methods import FixMatch
from support.compare import gradient_of
from support.models import SquareOnce
from support.nets import Net, net, views


def _mixing() -> Net:
    """Mixes the batch while `switch` is in train mode."""
    mixed = lambda net, h: h - 0.5 * h.mean(0) if net.switch.training else h  # noqa: E731
    return net(lambda net, x: mixed(net, torch.tanh(net.stem(x))), switch=nn.Sequential(nn.Identity()))


def test_a_refusal_holds_on_every_call() -> None:
    gc = GradientConsistencyLoss(_mixing())
    for _ in range(3):
        with pytest.raises(UnsupportedModuleError, match="other samples"):
            gc(*views())


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_missing_second_derivative_is_refused_on_every_call_and_after_a_measurement(engine: str) -> None:
    gc = GradientConsistencyLoss(net(lambda net, x: SquareOnce.apply(net.stem(x))), engine=engine)
    for _ in range(2):
        gc.measure(*views())  # first derivatives are all that it needs
        with pytest.raises(UnsupportedModuleError, match="second derivative"):
            gc(*views())


def test_a_module_that_changes_its_mode_is_tried_again() -> None:
    model = _mixing()
    model.switch.eval()
    gc = GradientConsistencyLoss(model)
    gc(*views())
    model.switch.train()  # the root was in train mode all the time
    with pytest.raises(UnsupportedModuleError, match="other samples"):
        gc(*views())


def test_a_model_that_is_called_with_other_constants_is_tried_again() -> None:
    def switched(net: Any, x: Tensor, way: str) -> Tensor:
        h = SquareOnce.apply(net.stem(x)) if way == "once" else torch.tanh(net.stem(x))
        return h - 0.5 * h.mean(0) if way == "mixing" else h

    gc = GradientConsistencyLoss(net(switched), engine="loop")
    weak, strong, target = views()
    gc((weak, "plain"), (strong, "plain"), target)
    for way, match in (("mixing", "other samples"), ("once", "second derivative")):
        with pytest.raises(UnsupportedModuleError, match=match):
            gc((weak, way), (strong, way), target)


def test_identical_first_views_do_not_settle_independence() -> None:
    weak, strong, target = views()
    gc = GradientConsistencyLoss(_mixing())
    with pytest.raises(UnsupportedModuleError, match="other samples"):
        gc(weak, torch.cat([weak[:1], strong[1:]]), target)


def test_equal_samples_do_not_settle_independence() -> None:
    """The mean of equal samples is any of them: another one tells, in this call or in the next."""
    weak, strong, target = (torch.cat([view[:1], view[:1], view[2:]]) for view in views())
    with pytest.raises(UnsupportedModuleError, match="other samples"):
        GradientConsistencyLoss(_mixing())(weak, strong, target)
    gc = GradientConsistencyLoss(_mixing())
    gc(weak[:2], weak[:2], target[:2])
    with pytest.raises(UnsupportedModuleError, match="other samples"):
        gc(weak[1:3], weak[1:3], target[1:3])


def test_chance_inside_the_model_is_named() -> None:
    model = net(lambda net, x: torch.tanh(net.stem(x + torch.randn_like(x))))
    with pytest.raises(UnsupportedModuleError, match="random numbers"):
        GradientConsistencyLoss(model)(*views())
    GradientConsistencyLoss(model, dropout="on")(*views()).backward()


def test_numbers_drawn_from_numpy_are_noticed_and_put_back() -> None:
    """Even where the output does not show them."""

    def draws(net: Any, x: Tensor) -> Tensor:
        np.random.random()
        return torch.tanh(net.stem(x))

    before = np.random.get_state()
    with pytest.raises(UnsupportedModuleError, match="drew random numbers"):
        GradientConsistencyLoss(net(draws), engine="loop")(*views())
    GradientConsistencyLoss(net(draws), engine="loop", dropout="on")(*views())
    after = np.random.get_state()
    assert after[2] == before[2]
    assert np.array_equal(after[1], before[1])


def test_a_loss_that_uses_the_models_parameters_is_the_same_in_every_engine() -> None:
    model = net()

    def decayed(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none") + 0.1 * model.head.weight.square().sum()

    loop, vmap, ghost = (
        gradient_of(GradientConsistencyLoss(model, loss_fn=decayed, engine=engine)(*views()), model)
        for engine in ("loop", "vmap", "ghost")
    )
    torch.testing.assert_close(loop, vmap, rtol=1e-10, atol=0)
    torch.testing.assert_close(loop, ghost, rtol=1e-10, atol=1e-15)


def test_a_parameter_used_past_its_module_is_refused() -> None:
    model = net()
    alias = model.head.weight

    def past(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none") + 0.1 * alias.square().sum()

    with pytest.raises(UnsupportedModuleError, match=r"'head\.weight'"):
        GradientConsistencyLoss(model, loss_fn=past)(*views())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_tensor_hooks_of_the_user_run_once_in_the_users_backward(engine: str, fused: bool) -> None:
    model = net()
    plain = GradientConsistencyLoss(model, engine=engine, fused=fused)
    value = plain(*views())
    expected = gradient_of(value, model)
    hook = model.stem.weight.register_hook(lambda gradient: 3 * gradient)
    hooked = plain(*views())
    assert torch.equal(hooked, value)
    found = gradient_of(hooked, model)
    hook.remove()
    expected[12:42] *= 3  # the stem's weight, behind gain and shift
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


class _FailsOnce(torch.autograd.Function):
    """Identity that runs out of memory in its first backward of several pairs."""

    left = 1

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        if _FailsOnce.left and len(upstream) > 1:
            _FailsOnce.left -= 1
            raise torch.OutOfMemoryError("simulated")
        return upstream


class _HungryEngine:
    def products(self, problem: Problem) -> GradProducts:
        return GradProducts(*(_FailsOnce.apply(part) for part in LoopEngine().products(problem).present()))


def test_out_of_memory_in_the_derivative_counts_nothing_twice() -> None:
    model = net()
    expected_loss = GradientConsistencyLoss(model, engine="loop")(*views())
    expected = gradient_of(expected_loss, model)
    _FailsOnce.left = 1
    loss = GradientConsistencyLoss(model, engine=_HungryEngine())(*views())
    assert _FailsOnce.left == 0
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_of(loss, model), expected, rtol=1e-12, atol=0)


def test_attributes_that_a_forward_sets_are_as_they_were() -> None:
    def keeping(net: Any, x: Tensor) -> Tensor:
        net.calls += 1
        net.features = net.stem(x)
        return net.features.tanh()

    model: Any = net(keeping)
    model.calls = 0
    GradientConsistencyLoss(model)(*views()).backward()
    assert not hasattr(model, "features"), "what was not there before goes again"
    assert model.calls == 0
    model(views()[0])
    features = model.features
    GradientConsistencyLoss(model)(*views()).backward()
    assert model.calls == 1
    assert model.features is features


def test_monitoring_draws_nothing_from_training() -> None:
    gc = GradientConsistencyLoss(net(), max_pairs=2)
    before = gc.state_dict()["generator"].clone()
    gc.measure(*views())
    assert torch.equal(gc.state_dict()["generator"], before)


def test_an_unused_parameter_gets_no_gradient() -> None:
    model = net()
    GradientConsistencyLoss(model)(*views()).backward()
    assert model.stem.weight.grad is not None
    assert model.gain.grad is None


def test_float16_overflow_does_not_hide_broken_parameters() -> None:
    model = net().float()
    with torch.no_grad():
        model.stem.weight[0, 0] = torch.nan
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(NonFiniteError, match=r"stem\.weight"):
        GradientConsistencyLoss(model)(*views(dtype=torch.float32))


def test_a_users_loss_runs_in_the_users_autocast() -> None:
    """`F.cross_entropy` is computed in float32 there; handed bare bfloat16 logits it would not be."""
    seen: list[torch.dtype] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target, reduction="none")
        seen.append(loss.dtype)
        return loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_fn(net().float()(views(dtype=torch.float32)[0]), views()[2]).dtype
        GradientConsistencyLoss(net().float(), loss_fn=loss_fn)(*views(dtype=torch.float32))
    assert set(seen) == {expected}


def test_soft_targets_survive_a_masked_class_and_one_hot_rows_equal_indices() -> None:
    model, (weak, strong, target) = net().float(), views(dtype=torch.float32)
    soft = torch.tensor([0.7, 0.2, 0.1, 0.0]).expand(4, 4)
    gc = GradientConsistencyLoss(nn.Sequential(model, nn.ConstantPad1d((0, 1), -1e9)))
    gc(weak, strong, soft)
    assert not gc.last.degenerate.any()
    by_index = GradientConsistencyLoss(model)(weak, strong, target)
    by_row = GradientConsistencyLoss(model)(weak, strong, F.one_hot(target, 3).float())
    torch.testing.assert_close(by_row, by_index, rtol=1e-6, atol=0)


def test_an_automatic_change_of_engine_leaves_no_trace_in_the_sums() -> None:
    def data_dependent(net: Any, x: Tensor) -> Tensor:
        h = torch.tanh(net.stem(x))
        positive = h.sum(1, keepdim=True) > 0
        return torch.where(positive, h * 1.5, h) if torch.ops.aten.item(positive.sum()) > 0 else h

    model, pairs = net(data_dependent).float(), views(17, torch.float32)
    gc = GradientConsistencyLoss(model)
    first, second = (gradient_of(gc(*pairs), model) for _ in range(2))
    assert torch.equal(first, second)


def test_hooks_on_saved_tensors_count() -> None:
    """What a layer needs for its gradient is kept in half precision."""

    def saved(net: Any, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept.half(), lambda packed: packed.double()):
            return torch.tanh(net.stem(x))

    model = net(saved)
    right = gradient_of(GradientConsistencyLoss(model, engine="loop")(*views()), model)
    for engine in ("auto", "ghost"):  # which run the layers sample by sample
        found = gradient_of(GradientConsistencyLoss(model, engine=engine)(*views()), model)
        torch.testing.assert_close(found, right, rtol=1e-9, atol=0.0)
    plain = GradientConsistencyLoss(net(), engine="ghost")
    with torch.autograd.graph.save_on_cpu():  # of the caller, around all
        value = plain(*views())
    assert torch.equal(value, plain(*views()))


def test_data_of_a_parameter_is_a_constant_or_refused() -> None:
    model = net(lambda net, x: torch.tanh(net.stem(x)) * net.stem.weight.data.mean())
    right = gradient_of(GradientConsistencyLoss(model, engine="loop")(*views()), model)
    torch.testing.assert_close(gradient_of(GradientConsistencyLoss(model)(*views()), model), right)
    with pytest.raises(UnsupportedModuleError, match=r"reads `\.data`"):
        GradientConsistencyLoss(model, engine="vmap")(*views())


def _in_place(*, copies: bool = False) -> Net:
    """Normalises its input in place, or a copy."""
    own = lambda x: x.clone() if copies else x  # noqa: E731
    return net(lambda net, x: torch.tanh(net.stem(own(x).sub_(0.3).mul_(1.5))))


@pytest.mark.parametrize("engine", ["auto", "ghost", "loop", "vmap"])
def test_a_model_may_write_into_its_input(engine: str) -> None:
    weak, strong, target = given = tuple(view.clone() for view in views())
    for options in ({}, {"fused": False}, {"stop_gradient": "weak", "chunk_size": 2}):
        found = []
        for copies in (False, True):
            model = _in_place(copies=copies)
            loss = GradientConsistencyLoss(model, engine=engine, **options)  # type: ignore[arg-type]
            found.append(gradient_of(loss(weak, strong, target), model))
        assert torch.equal(*found)
    assert all(map(torch.equal, given, views()))


@pytest.mark.parametrize(("joint", "share"), [(True, "auto"), (False, "auto"), (False, False)])
def test_a_model_that_writes_into_its_input_takes_the_same_step(joint: bool, share: Any) -> None:
    found = []
    for copies in (False, True):
        model, (weak, strong, target) = _in_place(copies=copies), (view.clone() for view in views())
        method = FixMatch(model, threshold=0.0, joint=joint)
        wrapper = GGCRWrapper(method, GradientConsistencyLoss(model), warmup_steps=0, share=share)
        out = wrapper(SSLBatch(weak[:2].clone(), target[:2], weak, strong))
        found.append(gradient_of(out.loss, model))
        assert torch.equal(weak, views()[0])
        assert torch.equal(strong, views()[1])
    assert torch.equal(*found)


def test_flatness_of_a_model_that_writes_into_its_input() -> None:
    weak, _, target = views()
    inplace, copying = (sharpness(_in_place(copies=copies), weak, target, ascent_steps=3) for copies in (False, True))
    assert inplace == copying
    assert torch.equal(weak, views()[0])


def test_a_derivative_inside_the_forward_is_told_what_to_do() -> None:
    def energy(*, graph: bool) -> Net:
        def forward(net: Any, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(graph or torch.is_grad_enabled()):
                x = x.detach().requires_grad_()
                h = torch.tanh(net.stem(x))
                (slope,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
            return h * slope.sum(1, keepdim=True)

        return net(forward)

    model = energy(graph=True)
    with pytest.raises(ConfigError, match=r"pass `fused=False` if the forward makes it for a derivative of its own"):
        GradientConsistencyLoss(model)(*views())
    found = gradient_of(GradientConsistencyLoss(model, fused=False)(*views()), model)
    assert torch.equal(found, gradient_of(GradientConsistencyLoss(model, fused=False, engine="loop")(*views()), model))
    with pytest.raises(ModelError, match=r"calls torch\.autograd\.grad.*use torch\.enable_grad\(\) around"):
        GradientConsistencyLoss(energy(graph=False))(*views())


def test_large_means_do_not_cancel_in_batchnorm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    weak, strong, target = views()
    weak, strong = ((8 * view).round() / 8 + 1000 for view in (weak, strong))  # neither these nor means are rounded
    gc = GradientConsistencyLoss(model)
    exact = gc.measure(weak, strong, target).cosine
    model.float()
    rounded = gc.measure(weak.float(), strong.float(), target).cosine
    assert float((rounded - exact).abs().max()) <= 2e-6


def test_the_wrapper_counts_no_step_that_failed_and_takes_no_other_model() -> None:
    model = net()
    wrapper = GGCRWrapper(FixMatch(model, threshold=0.0), GradientConsistencyLoss(model), warmup_steps=0)
    weak, strong, target = views()
    with pytest.raises(ConfigError, match="`min_norm` is 'broken'"):
        wrapper.consistency.min_norm = "broken"
    assert wrapper.consistency.min_norm == 1e-8
    wrapper.consistency.loss_fn = lambda output, target: output.sum()
    with pytest.raises(LossContractError, match="one loss per sample"):
        wrapper(SSLBatch(weak, target, weak, strong))
    assert wrapper.step == 0
    with pytest.raises(ConfigError, match="same model"):
        GGCRWrapper(FixMatch(net()), GradientConsistencyLoss(model))


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = net()
    wrapper = GGCRWrapper(FixMatch(model), GradientConsistencyLoss(model))
    for step, generator in ((-5, None), ("x", None), (7, torch.zeros(3)), (7, 3)):
        state = wrapper.get_extra_state()
        state["step"] = step
        if generator is not None:
            state["consistency"] = {"generator": generator}
        with pytest.raises(StateError, match=r"state"):
            wrapper.set_extra_state(state)
        assert wrapper.step == 0
