"""The ghost engine on every model of both zoos, against the oracle: its forms, with the options in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, ViewPair
from gradconsist.engines import AutoEngine, GhostEngine, LoopEngine
from gradconsist.errors import ConfigError, UnsupportedModuleError
from support import compare
from support.layer_zoo import LAYER_CASES
from support.models import Layers
from support.oracle import cross_entropy, judge
from support.zoo import CASES, Problem

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # torch, of vmap over Bilinear
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]
ALL = {**CASES, **LAYER_CASES}
FORMS = pytest.mark.parametrize("form", ["auto", "gradient", "gram"])
DOUBLE, SINGLE = torch.float64, torch.float32

# (dtype, fused, chunk_size, stop_gradient): a model meets one row in each form, the next model the next ones, so that
# every row meets every form. Neighbours share constant views, so that the oracle is asked twice a model. Every third
# model is also called in the form "auto", every third one in float32.
SETTINGS: list[tuple[torch.dtype, bool, int | None, str | None]] = [
    (DOUBLE, True, 1, None),
    (DOUBLE, False, None, None),
    (DOUBLE, False, 3, "weak"),
    (DOUBLE, True, 3, "weak"),
    (DOUBLE, True, None, "strong"),
    (DOUBLE, False, 1, "strong"),
]
SINGLE_SETTINGS: list[tuple[torch.dtype, bool, int | None, str | None]] = [
    (SINGLE, True, 3, None),
    (SINGLE, False, None, "weak"),
]


WEIGHT = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.25], dtype=DOUBLE)


def _loss(problem: Problem, **options: Any) -> GradientConsistencyLoss:
    case = problem.case
    return GradientConsistencyLoss(problem.model, encoder=case.encoder, loss_fn=case.loss_fn, **options)


def _rows(name: str) -> Iterator[tuple[Any, torch.dtype, bool, int | None, str | None]]:
    """The calls that one model gets: each with a form of the engine. "auto" is every model's default, tested below."""
    place, forms = list(ALL).index(name), ("gradient", "gram", "auto")
    for turn, form in enumerate(forms[:2]):
        yield form, *SETTINGS[(place + turn) % len(SETTINGS)]
    if place % 3 == 1:
        yield "auto", *SETTINGS[place // 3 % len(SETTINGS)]
    if place % 3 == 0:
        yield forms[place // 3 % 3], *SINGLE_SETTINGS[place // 3 % 2]


@pytest.mark.parametrize("name", ALL)
def test_every_model_is_exact_in_every_form(name: str) -> None:
    for form, dtype, fused, chunk_size, stop in _rows(name):
        problem = ALL[name].problem(dtype=dtype)
        gc = _loss(problem, engine=GhostEngine(form=form), fused=fused, chunk_size=chunk_size, stop_gradient=stop)
        if ALL[name].ghost == "refused":
            with pytest.raises(UnsupportedModuleError, match="engine='loop'"):
                gc(*problem.views)
            continue
        compare.assert_exact(gc, problem.views, ALL[name].verdict(dtype=dtype, stop_gradient=stop))


@pytest.mark.parametrize("name", ALL)
def test_the_defaults_and_measure_are_exact(name: str) -> None:
    """`engine="auto"` with its own chunk; `measure`, which has constant views only, in one of the forms."""
    verdict = ALL[name].verdict(stop_gradient=None)
    problem = ALL[name].problem()
    gc = _loss(problem)
    compare.assert_exact(gc, problem.views, verdict)
    form: Any = ("gradient", "gram")[list(ALL).index(name) % 2]
    engine: Any = GhostEngine(form=form) if ALL[name].ghost == "exact" else "auto"
    compare.assert_measures(_loss(problem, engine=engine).measure(*problem.views), verdict)


@FORMS
@pytest.mark.parametrize("name", ["mlp", "wrn_slice", "vit", "tied_embedding", "frames", "lstm_deep", "shared"])
def test_weights_and_single_cotangents(name: str, form: Any) -> None:
    """Zero and soft weights; and `reduction="none"`, where every pair gets a cotangent of its own."""
    problem = ALL[name].problem()
    gc = _loss(problem, engine=GhostEngine(form=form), chunk_size=2)
    gradient = compare.gradient_of(gc(*problem.views, WEIGHT), problem.model)
    assert compare.relative(gradient, ALL[name].verdict(WEIGHT).flat) <= 1e-8
    single = _loss(problem, engine=GhostEngine(form=form), reduction="none", fused=False)
    cotangent = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=DOUBLE)
    gradient = compare.gradient_of(single(*problem.views), problem.model, cotangent)
    expected = ALL[name].verdict(reduction="none", cotangent=cotangent)
    assert compare.relative(gradient, expected.flat) <= 1e-8


CHUNKED = ["wrn_slice", "vit", "text_negative_padding_tied", "conv2d_dilated_groups"]


@FORMS
@pytest.mark.parametrize("name", CHUNKED)
def test_two_calls_are_bitwise_equal_and_chunks_agree(name: str, form: Any) -> None:
    """Chunks of 1, 2, 3 and 50 pairs and automatic ones in turn."""
    problem = ALL[name].problem(pairs=7)
    place = CHUNKED.index(name) + ["auto", "gradient", "gram"].index(form)
    seen = {}
    for chunk_size in (None, None, (1, 2, 3)[place % 3], (50, "auto")[place % 2]):
        gc = _loss(problem, engine=GhostEngine(form=form), chunk_size=chunk_size)
        loss = gc(*problem.views)
        gradient = compare.gradient_of(loss, problem.model)
        assert gc.last is not None
        found = (loss.detach(), gradient, gc.last.cosine, gc.last.norm_weak)
        for a, b in zip(found, seen.setdefault(chunk_size, found), strict=True):
            assert torch.equal(a, b), "the same call again"
        assert compare.relative(gradient, seen[None][1]) <= 1e-12
        assert compare.cosine_error(gc.last.cosine, seen[None][2]) <= 1e-13


def _lengths() -> nn.Module:
    """A bag of words with a convolution and attention, for texts of any length."""

    def forward(m: Any, ids: Tensor) -> Tensor:
        x = torch.tanh(m.convolution(m.embedding(ids).transpose(1, 2)).transpose(1, 2))
        return m.head(m.attention(x, x, x)[0].mean(1))

    layers = {"convolution": nn.Conv1d(6, 6, 2), "attention": nn.MultiheadAttention(6, 2, batch_first=True)}
    return Layers(forward, embedding=nn.Embedding(9, 6, padding_idx=0), **layers, head=nn.Linear(6, 3)).double()


@FORMS
@pytest.mark.parametrize("stop", [None, "weak", "strong"])
def test_views_of_different_lengths(form: Any, stop: str | None) -> None:
    model = _lengths()
    weak, strong, target = torch.randint(9, (4, 6)), torch.randint(9, (4, 8)), torch.randint(3, (4,))
    verdict = judge(model, weak, strong, target, stop_gradient=stop, batchnorm="running", observed=weak)
    for fused, chunk_size in ((True, 3), (False, None)):
        gc = GradientConsistencyLoss(
            model, engine=GhostEngine(form=form), stop_gradient=stop, fused=fused, chunk_size=chunk_size
        )
        compare.assert_exact(gc, (weak, strong, target), verdict)
        assert compare.cosine_error(gc.measure(weak, strong, target).cosine, verdict.cosine) <= 1e-10


@pytest.mark.parametrize("form", ["gradient", "gram"])
@pytest.mark.parametrize("name", ["checkpointed", "data_dependent", "lstm_cell", "mlp_user_loss_one_hot"])
def test_what_vmap_refuses_is_exact_under_auto(name: str, form: Any, caplog: pytest.LogCaptureFixture) -> None:
    problem = ALL[name].problem()
    gc = _loss(problem, engine="auto")
    assert isinstance(gc.engine, AutoEngine)
    gc.engine.engine = GhostEngine(form=form)
    compare.assert_exact(gc, problem.views, ALL[name].verdict(stop_gradient=None))
    fell_back = ALL[name].ghost == "refused"
    assert isinstance(gc.engine.engine, LoopEngine) == fell_back
    assert ("per-sample loop" in caplog.text) == fell_back


def test_the_form_has_a_known_name() -> None:
    for form in ("ghost", "measured"):
        with pytest.raises(ConfigError, match=rf"`form` is '{form}': choose one of 'auto', 'gradient', 'gram'"):
            GhostEngine(form=form)  # type: ignore[arg-type]
    assert GradientConsistencyLoss(nn.Linear(2, 2), engine="ghost").engine == GhostEngine()


@FORMS
@pytest.mark.parametrize("name", ["wrn_slice", "cnn_batchnorm_twice", "basic_block", "frames"])
def test_observed_statistics_of_the_wrapper(name: str, form: Any) -> None:
    """`batchnorm="observed"`: here the method's forward saw both views, so the constants are the joint ones."""
    problem = ALL[name].problem()

    def method(weak: Tensor, strong: Tensor) -> Tensor:
        logits = problem.model(torch.cat([weak, strong]))
        return cross_entropy(logits, torch.arange(len(logits)) % 3).mean()

    gc = GradientConsistencyLoss(problem.model, engine=GhostEngine(form=form), batchnorm="observed")
    pair = ViewPair(problem.weak, problem.strong, problem.target)
    wrapper = GGCRWrapper(method, gc, weight=1.0, warmup_steps=0, gate="all", pair_fn=lambda *_: pair)
    out = wrapper(problem.weak, problem.strong)
    total = compare.gradient_of(out.loss, problem.model)
    base = compare.gradient_of(method(problem.weak, problem.strong), problem.model)
    verdict = problem.judge(observed=torch.cat([problem.weak, problem.strong])).verdict()
    assert gc.last is not None
    assert compare.cosine_error(gc.last.cosine, verdict.cosine) <= 1e-10
    assert compare.relative(total - base, verdict.flat) <= 1e-8
