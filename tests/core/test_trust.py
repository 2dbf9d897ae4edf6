"""What must not go wrong in silence, and was found to by reading: refusals that last, aliases, hooks, retries."""

from __future__ import annotations

from collections.abc import Callable
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
from support.models import SquareOnce

Views = tuple[Tensor, Tensor, Tensor]


def _views(dtype: torch.dtype = torch.float64, pairs: int = 5) -> Views:
    torch.manual_seed(0)
    weak = torch.randn(pairs, 4, dtype=dtype)
    return weak, weak + 0.3 * torch.randn(pairs, 4, dtype=dtype), torch.arange(pairs) % 3


def _mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def _gradient(loss: Tensor, model: nn.Module) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class _Mixing(nn.Module):
    """Mixes the batch while `on` is in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _mlp()
        self.switch = nn.Sequential(nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers(x)
        return z - 0.5 * z.mean(0) if self.switch.training else z


class _OnceModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(SquareOnce.apply(self.first(x)))


@pytest.mark.parametrize(("model", "match"), [(_Mixing, "other samples"), (_OnceModel, "second derivative")])
def test_a_refusal_holds_on_every_call(model: Callable[[], nn.Module], match: str) -> None:
    gc = GradientConsistencyLoss(model(), engine="auto")
    for _ in range(3):
        with pytest.raises(UnsupportedModuleError, match=match):
            gc(*_views())


def test_measuring_first_does_not_settle_the_second_derivative() -> None:
    gc = GradientConsistencyLoss(_OnceModel(), engine="loop")
    gc.measure(*_views())  # first derivatives are all that it needs
    with pytest.raises(UnsupportedModuleError, match="second derivative"):
        gc(*_views())


def test_a_module_that_changes_its_mode_is_tried_again() -> None:
    model = _Mixing()
    model.switch.eval()
    gc = GradientConsistencyLoss(model)
    gc(*_views())
    model.switch.train()  # the root was in train mode all the time
    with pytest.raises(UnsupportedModuleError, match="other samples"):
        gc(*_views())


def test_a_model_that_is_called_with_other_constants_is_tried_again() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = _mlp()

        def forward(self, x: Tensor, way: str) -> Tensor:
            z = self.layers(x if way != "once" else SquareOnce.apply(self.layers[:2](x))[:, :4])
            return z - 0.5 * z.mean(0) if way == "mixing" else z

    gc = GradientConsistencyLoss(Switched(), engine="loop")
    weak, strong, target = _views()
    gc((weak, "plain"), (strong, "plain"), target)
    for way, match in (("mixing", "other samples"), ("once", "second derivative")):
        with pytest.raises(UnsupportedModuleError, match=match):
            gc((weak, way), (strong, way), target)


def test_identical_first_views_do_not_settle_independence() -> None:
    weak, strong, target = _views()
    gc = GradientConsistencyLoss(_Mixing())
    with pytest.raises(UnsupportedModuleError, match="other samples"):
        gc(weak, torch.cat([weak[:1], strong[1:]]), target)


def test_equal_samples_do_not_settle_independence() -> None:
    """The mean of equal samples is any of them: another one tells, in this call or in the next."""
    weak, strong, target = (torch.cat([view[:1], view[:1], view[2:]]) for view in _views())
    with pytest.raises(UnsupportedModuleError, match="other samples"):
        GradientConsistencyLoss(_Mixing())(weak, strong, target)
    gc = GradientConsistencyLoss(_Mixing())
    gc(weak[:2], weak[:2], target[:2])
    with pytest.raises(UnsupportedModuleError, match="other samples"):
        gc(weak[1:3], weak[1:3], target[1:3])


def test_chance_inside_the_model_is_named() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = _mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x + torch.randn_like(x))

    with pytest.raises(UnsupportedModuleError, match="random numbers"):
        GradientConsistencyLoss(Noisy())(*_views())
    GradientConsistencyLoss(Noisy(), dropout="on")(*_views()).backward()


def test_numbers_drawn_from_numpy_are_noticed_and_put_back() -> None:
    """Even where the output does not show them."""

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = _mlp()

        def forward(self, x: Tensor) -> Tensor:
            np.random.random()
            return self.layers(x)

    before = np.random.get_state()
    with pytest.raises(UnsupportedModuleError, match="drew random numbers"):
        GradientConsistencyLoss(Draws(), engine="loop")(*_views())
    GradientConsistencyLoss(Draws(), engine="loop", dropout="on")(*_views())
    after = np.random.get_state()
    assert after[2] == before[2]
    assert np.array_equal(after[1], before[1])


def test_a_loss_that_uses_the_models_parameters_is_the_same_in_every_engine() -> None:
    model = _mlp()

    def decayed(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none") + 0.1 * model[2].weight.square().sum()

    loop, vmap, ghost = (
        _gradient(GradientConsistencyLoss(model, loss_fn=decayed, engine=engine)(*_views()), model)
        for engine in ("loop", "vmap", "ghost")
    )
    torch.testing.assert_close(loop, vmap, rtol=1e-10, atol=0)
    torch.testing.assert_close(loop, ghost, rtol=1e-10, atol=1e-15)


def test_a_parameter_used_past_its_module_is_refused() -> None:
    model = _mlp()
    alias = model[2].weight

    def past(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none") + 0.1 * alias.square().sum()

    with pytest.raises(UnsupportedModuleError, match=r"'2\.weight'"):
        GradientConsistencyLoss(model, loss_fn=past)(*_views())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_tensor_hooks_of_the_user_run_once_in_the_users_backward(engine: str, fused: bool) -> None:
    model = _mlp()
    plain = GradientConsistencyLoss(model, engine=engine, fused=fused)
    value = plain(*_views())
    expected = _gradient(value, model)
    hook = model[0].weight.register_hook(lambda gradient: 3 * gradient)
    hooked = plain(*_views())
    assert torch.equal(hooked, value)
    found = _gradient(hooked, model)
    hook.remove()
    expected[:32] *= 3  # the first weight
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
    model = _mlp()
    expected_loss = GradientConsistencyLoss(model, engine="loop")(*_views())
    expected = _gradient(expected_loss, model)
    _FailsOnce.left = 1
    loss = GradientConsistencyLoss(model, engine=_HungryEngine())(*_views())
    assert _FailsOnce.left == 0
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(_gradient(loss, model), expected, rtol=1e-12, atol=0)


def test_attributes_that_a_forward_sets_are_as_they_were() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = _mlp()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.features = self.layers[0](x)
            return self.layers[2](self.features.tanh())

    model = Keeping()
    GradientConsistencyLoss(model)(*_views()).backward()
    assert not hasattr(model, "features"), "what was not there before goes again"
    assert model.calls == 0
    model(_views()[0])
    features = model.features
    GradientConsistencyLoss(model)(*_views()).backward()
    assert model.calls == 1
    assert model.features is features


def test_monitoring_draws_nothing_from_training() -> None:
    gc = GradientConsistencyLoss(_mlp(), max_pairs=2)
    before = gc.state_dict()["generator"].clone()
    gc.measure(*_views())
    assert torch.equal(gc.state_dict()["generator"], before)


def test_an_unused_parameter_gets_no_gradient() -> None:
    model = _mlp()
    model.register_module("unused", nn.Linear(2, 2).double())
    for module in (model,):
        forward = nn.Sequential(*list(model.children())[:3])
        module.forward = forward.forward  # type: ignore[method-assign]
    GradientConsistencyLoss(model)(*_views()).backward()
    assert model[0].weight.grad is not None
    assert model.unused.weight.grad is None


def test_float16_overflow_does_not_hide_broken_parameters() -> None:
    model = _mlp().float()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(NonFiniteError, match=r"0\.weight"):
        GradientConsistencyLoss(model)(*_views(torch.float32))


def test_a_users_loss_runs_in_the_users_autocast() -> None:
    """`F.cross_entropy` is computed in float32 there; handed bare bfloat16 logits it would not be."""
    seen: list[torch.dtype] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target, reduction="none")
        seen.append(loss.dtype)
        return loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_fn(_mlp().float()(_views(torch.float32)[0]), _views()[2]).dtype
        GradientConsistencyLoss(_mlp().float(), loss_fn=loss_fn)(*_views(torch.float32))
    assert set(seen) == {expected}


def test_soft_targets_survive_a_masked_class_and_one_hot_rows_equal_indices() -> None:
    model, (weak, strong, target) = _mlp().float(), _views(torch.float32)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.inner(x), torch.full([len(x), 1], -1e9)], 1)

    soft = torch.tensor([0.7, 0.2, 0.1, 0.0]).expand(5, 4)
    gc = GradientConsistencyLoss(Masked())
    gc(weak, strong, soft)
    assert not gc.last.degenerate.any()
    by_index = GradientConsistencyLoss(model)(weak, strong, target)
    by_row = GradientConsistencyLoss(model)(weak, strong, F.one_hot(target, 3).float())
    torch.testing.assert_close(by_row, by_index, rtol=1e-6, atol=0)


def test_an_automatic_change_of_engine_leaves_no_trace_in_the_sums() -> None:
    class DataDependent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = _mlp().float()

        def forward(self, x: Tensor) -> Tensor:
            z = self.layers(x)
            positive = z.sum(1, keepdim=True) > 0
            return torch.where(positive, z * 1.5, z) if torch.ops.aten.item(positive.sum()) > 0 else z

    model, views = DataDependent(), _views(torch.float32, pairs=17)
    gc = GradientConsistencyLoss(model)
    first, second = (_gradient(gc(*views), model) for _ in range(2))
    assert torch.equal(first, second)


class _Saved(nn.Module):
    """Keeps what a layer needs for its gradient in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.half(), lambda packed: packed.double()):
            return self.layers(x)


def test_hooks_on_saved_tensors_count() -> None:
    model = _Saved()
    right = _gradient(GradientConsistencyLoss(model, engine="loop")(*_views()), model)
    for engine in ("auto", "ghost"):  # which run the layers sample by sample
        found = _gradient(GradientConsistencyLoss(model, engine=engine)(*_views()), model)
        torch.testing.assert_close(found, right, rtol=1e-9, atol=0.0)
    plain = GradientConsistencyLoss(model.layers, engine="ghost")
    with torch.autograd.graph.save_on_cpu():  # of the caller, around all
        value = plain(*_views())
    assert torch.equal(value, plain(*_views()))


def test_data_of_a_parameter_is_a_constant_or_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = _mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) * self.layers[0].weight.data.mean()  # type: ignore[union-attr]

    model = Scaled()
    right = _gradient(GradientConsistencyLoss(model, engine="loop")(*_views()), model)
    torch.testing.assert_close(_gradient(GradientConsistencyLoss(model)(*_views()), model), right)
    with pytest.raises(UnsupportedModuleError, match=r"reads `\.data`"):
        GradientConsistencyLoss(model, engine="vmap")(*_views())


class _InPlace(nn.Module):
    """Normalises its input in place, or a copy."""

    def __init__(self, *, copies: bool = False) -> None:
        super().__init__()
        self.layers, self.copies = _mlp(), copies

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone() if self.copies else x
        return self.layers(x.sub_(0.3).mul_(1.5))


@pytest.mark.parametrize("engine", ["auto", "ghost", "loop", "vmap"])
def test_a_model_may_write_into_its_input(engine: str) -> None:
    weak, strong, target = given = tuple(view.clone() for view in _views())
    for options in ({}, {"fused": False}, {"stop_gradient": "weak", "chunk_size": 2}):
        found = []
        for copies in (False, True):
            model = _InPlace(copies=copies)
            loss = GradientConsistencyLoss(model, engine=engine, **options)  # type: ignore[arg-type]
            found.append(_gradient(loss(weak, strong, target), model))
        assert torch.equal(*found)
    assert all(map(torch.equal, given, _views()))


@pytest.mark.parametrize(("joint", "share"), [(True, "auto"), (False, "auto"), (False, False)])
def test_a_model_that_writes_into_its_input_takes_the_same_step(joint: bool, share: Any) -> None:
    found = []
    for copies in (False, True):
        model, (weak, strong, target) = _InPlace(copies=copies), (view.clone() for view in _views())
        method = FixMatch(model, threshold=0.0, joint=joint)
        wrapper = GGCRWrapper(method, GradientConsistencyLoss(model), warmup_steps=0, share=share)
        out = wrapper(SSLBatch(weak[:2].clone(), target[:2], weak, strong))
        found.append(_gradient(out.loss, model))
        assert torch.equal(weak, _views()[0])
        assert torch.equal(strong, _views()[1])
    assert torch.equal(*found)


def test_flatness_of_a_model_that_writes_into_its_input() -> None:
    weak, _, target = _views()
    inplace, copying = (sharpness(_InPlace(copies=copies), weak, target, ascent_steps=3) for copies in (False, True))
    assert inplace == copying
    assert torch.equal(weak, _views()[0])


def test_a_derivative_inside_the_forward_is_told_what_to_do() -> None:
    class Energy(nn.Module):
        def __init__(self, *, graph: bool) -> None:
            super().__init__()
            self.layers, self.graph = _mlp(), graph

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.graph or torch.is_grad_enabled()):
                x = x.detach().requires_grad_()
                z = self.layers(x)
                (slope,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
            return z * slope.sum(1, keepdim=True)

    model = Energy(graph=True)
    with pytest.raises(ConfigError, match=r"pass `fused=False` if the forward makes it for a derivative of its own"):
        GradientConsistencyLoss(model)(*_views())
    found = _gradient(GradientConsistencyLoss(model, fused=False)(*_views()), model)
    assert torch.equal(found, _gradient(GradientConsistencyLoss(model, fused=False, engine="loop")(*_views()), model))
    with pytest.raises(ModelError, match=r"calls torch\.autograd\.grad.*use torch\.enable_grad\(\) around"):
        GradientConsistencyLoss(Energy(graph=False))(*_views())


def test_large_means_do_not_cancel_in_batchnorm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    weak, strong, target = _views()
    weak, strong = weak + 1000, strong + 1000
    gc = GradientConsistencyLoss(model)
    exact = gc.measure(weak, strong, target).cosine
    model.float()
    rounded = gc.measure(weak.float(), strong.float(), target).cosine
    assert float((rounded - exact).abs().max()) <= 2e-5


def test_the_wrapper_counts_no_step_that_failed_and_takes_no_other_model() -> None:
    model = _mlp()
    wrapper = GGCRWrapper(FixMatch(model, threshold=0.0), GradientConsistencyLoss(model), warmup_steps=0)
    weak, strong, target = _views()
    with pytest.raises(ConfigError, match="`min_norm` is 'broken'"):
        wrapper.consistency.min_norm = "broken"
    assert wrapper.consistency.min_norm == 1e-8
    wrapper.consistency.loss_fn = lambda output, target: output.sum()
    with pytest.raises(LossContractError, match="one loss per sample"):
        wrapper(SSLBatch(weak, target, weak, strong))
    assert wrapper.step == 0
    with pytest.raises(ConfigError, match="same model"):
        GGCRWrapper(FixMatch(_mlp()), GradientConsistencyLoss(model))


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = _mlp()
    wrapper = GGCRWrapper(FixMatch(model), GradientConsistencyLoss(model))
    for step, generator in ((-5, None), ("x", None), (7, torch.zeros(3)), (7, 3)):
        state = wrapper.get_extra_state()
        state["step"] = step
        if generator is not None:
            state["consistency"] = {"generator": generator}
        with pytest.raises(StateError, match=r"state"):
            wrapper.set_extra_state(state)
        assert wrapper.step == 0
