"""What a layer-wise engine can get wrong in silence: overwritten inputs, cancellation, stale outputs, traces left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gradconsist import GradientConsistencyLoss
from gradconsist._forward import statistics
from gradconsist.engines import GhostEngine
from gradconsist.engines.ghost.coverage import check_coverage
from gradconsist.engines.ghost.record import Use
from gradconsist.engines.ghost.rules import Bias
from gradconsist.errors import UnsupportedModuleError
from support import compare
from support.layer_zoo import LAYER_CASES
from support.nets import Layers
from support.oracle import judge
from support.zoo import CASES

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch, of vmap
DOUBLE = torch.float64
FORMS = pytest.mark.parametrize("form", ["auto", "gradient", "gram"])
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])


def _agrees(model: nn.Module, weak: Tensor, strong: Tensor, **options: Any) -> GradientConsistencyLoss:
    """The ghost engine against the oracle: loss, gradient, and `measure`; returns the loss."""
    dtype = next(model.parameters()).dtype
    target = torch.arange(len(weak)) % 3
    stop = options.get("stop_gradient")
    compared = options.get("encoder")
    verdict = judge(model, weak, strong, target, stop_gradient=stop, compared=compared)
    gc = GradientConsistencyLoss(model, **{"engine": "ghost", **options})
    compare.assert_exact(gc, (weak, strong, target), verdict)
    record = gc.measure(weak, strong, target)
    assert compare.cosine_error(record.cosine, verdict.cosine) <= compare.TOLERANCE[dtype][0]
    return gc


def _refused(model: nn.Module, weak: Tensor, strong: Tensor, match: str) -> None:
    """By the loss and by `measure`."""
    gc = GradientConsistencyLoss(model, engine="ghost")
    for call in (gc, gc.measure):
        with pytest.raises(UnsupportedModuleError, match=match):
            call(weak, strong, torch.arange(len(weak)) % 3)


def _views(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(4, *shape, dtype=DOUBLE), torch.randn(4, *shape, dtype=DOUBLE)


# -- what is overwritten -----------------------------------------------------------------------------------------------


def _overwriting(net: Any, x: Tensor) -> Tensor:
    z = x.clone()
    y = net.layer(z)
    z.mul_(0.5)
    return net.head(torch.tanh(y).flatten(2).mean(2) if y.dim() > 2 else torch.tanh(y))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(5, 4), (5,)), (nn.Conv2d(3, 4, 2), (3, 4, 4)), (nn.ConvTranspose1d(3, 4, 2), (3, 4))],
    ids=["linear", "conv2d", "transposed"],
)
def test_a_layer_input_that_is_overwritten_later(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = Layers(_overwriting, layer=layer, head=nn.Linear(4, 3)).double()
    _refused(model, *_views(*shape), match=r"layer\.weight.*overwritten.*inplace=False")
    for engine in ("loop", "vmap"):
        with pytest.raises(UnsupportedModuleError, match=r"inplace=False.*modified by an inplace operation"):
            GradientConsistencyLoss(model, engine=engine)(*_views(*shape), torch.arange(4) % 3)


def test_tokens_that_are_overwritten_later() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        ids = x.clone()
        y = net.table(ids)
        ids.zero_()
        return net.head(torch.tanh(y).mean(1))

    model = Layers(forward, table=nn.Embedding(9, 4), head=nn.Linear(4, 3)).double()
    _refused(model, torch.randint(9, (4, 6)), torch.randint(9, (4, 6)), match=r"table\.weight.*overwritten")


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda y: F.relu(y, inplace=True),
        lambda y: F.leaky_relu(y, 0.2, inplace=True),
        nn.ReLU(inplace=True),
        nn.LeakyReLU(0.2, inplace=True),
        torch.relu_,
        lambda y: y.relu_(),
    ],
    ids=["relu", "leaky_relu", "ReLU", "LeakyReLU", "torch.relu_", "Tensor.relu_"],
)
def test_an_activation_in_place_whose_result_nobody_takes(overwrite: Any) -> None:
    """What follows reads the tensor that was overwritten."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.layer(x)
        overwrite(y)
        return net.head(y)

    _agrees(Layers(forward, layer=nn.Linear(5, 6), head=nn.Linear(6, 3)).double(), *_views(5))


def test_a_use_whose_gradient_never_came_is_refused() -> None:
    """By hand, since no model is known that brings it about: a second line of defence."""
    parameter = nn.Parameter(torch.randn(3))
    alias = parameter.view_as(parameter)
    y = 2 * alias
    use = Use("layer.bias", Bias(-1, 1), (), (), get_gradient_edge(y), alias.grad_fn)
    check_coverage(y.sum(), [use], [torch.ones(3)])
    check_coverage(parameter.sum(), [use], [None])
    with pytest.raises(UnsupportedModuleError, match=r"parameter 'layer\.bias' was overwritten in a way that hides"):
        check_coverage(y.sum(), [use], [None])


# -- cancellation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0.3, 1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_positions_that_cancel_in_float32(kind: str, left: float) -> None:
    """The compared gradient is `left` of the sum of its positions' sizes: no form loses more of it than the loop."""
    sign = torch.tensor([1.0, -1.0]).repeat(4) + left * torch.linspace(-1, 2, 8)

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.layer(x) if kind != "conv" else net.layer(x).transpose(1, 2)
        return net.head(torch.tanh((y * sign.to(y.dtype)[:, None]).sum(1)))

    layer: nn.Module = {"linear": nn.Linear(6, 5), "conv": nn.Conv1d(6, 5, 1), "embedding": nn.Embedding(9, 5)}[kind]
    model = Layers(forward, layer=layer, head=nn.Linear(5, 3))
    if kind == "embedding":
        weak, strong = (torch.randint(9, (4, 4)).repeat_interleave(2, 1) for _ in range(2))
        strong[:, :4] = weak[:, :4]
    else:
        weak, strong = (torch.randn(4, 1, 6).expand(-1, 8, -1) + left * torch.randn(4, 8, 6) for _ in range(2))
        weak, strong = (x.transpose(1, 2).contiguous() if kind == "conv" else x for x in (weak, strong))
    target = torch.arange(4) % 3
    verdict = judge(model, weak, strong, target, compared=lambda name: name == "layer.weight")
    errors = {}
    forms: Any = ("auto", "gradient", "gram")
    for name, engine in {"loop": "loop", **{form: GhostEngine(form=form) for form in forms}}.items():
        gc = GradientConsistencyLoss(model, engine=engine, encoder=lambda name: name == "layer.weight")
        gradient = compare.gradient_of(gc(weak, strong, target), model)
        assert gc.last is not None
        cosine = compare.cosine_error(gc.last.cosine, verdict.cosine)
        errors[name] = (cosine, compare.relative(gradient, verdict.flat))
    for name in forms:
        for error, loop, tolerance in zip(errors[name], errors["loop"], compare.TOLERANCE[torch.float32], strict=True):
            assert error <= max(tolerance, 5 * loop), (name, errors)


# -- what a model does around a convolution ----------------------------------------------------------------------------


def _in_place_activation(net: Any, x: Tensor) -> Tensor:
    return net.norm(F.leaky_relu(net.conv(x), 0.3, inplace=True))


def _in_place_residual(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y += 1.5 * x
    return net.norm(y)


def _in_place_slice(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, 1:3].mul_(0.5)
    return net.norm(y)


def _reordered(net: Any, x: Tensor) -> Tensor:
    """Sorted by a property of the samples, convolved, and put back: usual for texts and sounds."""
    order = x.flatten(1).sum(1).argsort()
    return net.norm(net.conv(x[order]))[order.argsort()]


def _twice(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(torch.tanh(net.conv(x))))


def _stems(net: Any, x: Tensor) -> Tensor:
    """Calls that cannot be told by rows (frames, no batch) between calls that can."""
    y = net.conv(torch.cat([x, x.flip(2)], 0))
    y = y[: len(x)] + torch.stack([net.conv(image) for image in x]) * y[len(x) :]
    return net.norm(net.conv(y))


def _with_bias(net: Any, x: Tensor) -> Tensor:
    """A bias that is another layer's, too."""
    return net.norm(F.conv2d(x, net.conv.weight, net.head.bias, padding=1))


AROUND = [_in_place_activation, _in_place_residual, _in_place_slice, _reordered, _twice, _stems, _with_bias]


@FORMS
@pytest.mark.parametrize("function", AROUND, ids=lambda function: function.__name__.strip("_"))
def test_a_convolution_is_exact_whatever_the_model_does_around_it(function: Any, form: Any) -> None:
    """Its output written into, the batch reordered, its weight used again."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.tanh(function(net, x)).mean((2, 3)))

    conv, norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
    model = Layers(forward, conv=conv, norm=norm, head=nn.Linear(3, 3)).double()
    weak, strong = _views(3, 4, 4)
    for options in ({"chunk_size": 3}, {"fused": False, "chunk_size": None}, {"stop_gradient": "weak"}):
        _agrees(model, weak, strong, engine=GhostEngine(form=form), **options)


def _upsampling() -> nn.Module:
    layers = nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4)
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.parametrize("name", ["wrn_slice", "cnn_batchnorm_twice", "upsampling"])
def test_statistics_by_parts_of_the_batch_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of five samples at a time, and two at last."""
    problem = CASES["wrn_slice" if name == "upsampling" else name].problem(pairs=6)
    model, (weak, *_) = problem.model, problem.views
    if name == "upsampling":
        model = _upsampling().double()
        model(weak)
    found = []
    for size in (2**24, 5 * weak[:1].nbytes):
        monkeypatch.setattr(statistics, "_PART_BYTES", size)
        found.append(compare.gradient_of(GradientConsistencyLoss(model, chunk_size=2)(*problem.views), model))
    assert compare.relative(found[1], found[0]) <= 1e-12
    monkeypatch.setattr(
        statistics, "_in_parts", lambda func, input, *args, **kwargs: func(2.0 * input, *args, **kwargs)
    )
    wrong = compare.gradient_of(GradientConsistencyLoss(model, chunk_size=2)(*problem.views), model)
    assert compare.relative(wrong, found[0]) > 1e-6, "the statistics come from there"


# -- what vmap does not run --------------------------------------------------------------------------------------------


class _NoRule(torch.autograd.Function):
    """Right, twice differentiable, and without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


def test_a_custom_function_without_a_vmap_rule() -> None:
    model = Layers(lambda net, x: net.head(_NoRule.apply(net.stem(x))), stem=nn.Linear(5, 6), head=nn.Linear(6, 3))
    model, views = model.double(), _views(5)
    _refused(model, *views, match="engine='loop'")
    _agrees(model, *views, engine="auto")


def _branching(net: Any, x: Tensor) -> Tensor:
    return net.inner(x) if torch.ops.aten.item(x.sum()) > 0 else torch.cos(net.inner(x))


@FORMS
def test_a_module_that_vmap_refuses_inside_a_model(form: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It runs sample by sample, with rows of its own parameters, tied and bare ones too; the rest runs as before."""
    part = Layers(lambda net, x: torch.stack([_branching(net, row) for row in x]), inner=nn.Linear(6, 6))
    stem = nn.Linear(5, 6)
    tied = nn.Linear(6, 6)
    tied.weight = part.inner.weight  # type: ignore[union-attr]
    model = nn.Sequential(stem, nn.Tanh(), part, nn.BatchNorm1d(6), nn.Tanh(), tied, nn.Linear(6, 3)).double()
    gc = _agrees(model, *_views(5), engine=GhostEngine(form=form))
    assert "sample by sample" in caplog.text
    for fused, chunk_size, stop in ((False, None, None), (True, 3, "weak"), (False, 1, "strong")):
        _agrees(model, *_views(5), engine=gc.engine, fused=fused, chunk_size=chunk_size, stop_gradient=stop)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: torch.vmap(net.stem)(x.unsqueeze(1)).squeeze(1),
        lambda net, x: net.stem(x) + torch.func.grad(lambda z: net.stem(z).square().sum())(x).sum(1, keepdim=True),
        lambda net, x: net.stem(x) * F.linear(x, net.stem.bias[:5])[:, None],
        lambda net, x: F.linear(x, net.stem.weight[0])[:, None] * net.stem(x),
        lambda net, x: torch.utils.checkpoint.checkpoint(net.stem, x, use_reentrant=False),
    ],
    ids=["vmap inside", "func.grad inside", "vector from bias", "vector from weight", "checkpoint"],
)
def test_unusual_calls_are_exact_or_refused(function: Any) -> None:
    model = Layers(lambda net, x: net.head(torch.tanh(function(net, x))), stem=nn.Linear(5, 6), head=nn.Linear(6, 3))
    try:
        _agrees(model.double(), *_views(5))
    except UnsupportedModuleError as error:
        assert "engine='loop'" in str(error)  # noqa: PT017


def test_packed_sequences() -> None:
    """Their batch sizes are data, which vmap cannot give out: refused by name, exact under `auto`."""

    def forward(net: Any, x: Tensor) -> Tensor:
        lengths = torch.full((len(x),), x.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return net.head(nn.utils.rnn.pad_packed_sequence(net.rnn(packed)[0], batch_first=True)[0][:, -1])

    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        model = Layers(forward, rnn=kind(4, 5, batch_first=True), head=nn.Linear(5, 3)).double()
        _refused(model, *_views(3, 4), match="engine='loop'")
        _agrees(model, *_views(3, 4), engine="auto")


# -- chance and higher derivatives -------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("name", ["dropout", "dropout2d", "vit_dropout", "transformer_layer", "lstm_deep"])
def test_dropout_on(name: str, form: Any) -> None:
    """Masks of their own for each view, drawn from the generator alone."""
    problem = {**CASES, **LAYER_CASES}[name].problem()
    gc = GradientConsistencyLoss(problem.model, engine=GhostEngine(form=form), dropout="on")
    before = torch.random.get_rng_state()
    values = []
    for seed in (1, 1, 2):
        loss = gc(problem.weak, problem.weak, problem.target, generator=torch.Generator().manual_seed(seed))
        values.append(compare.gradient_of(loss, problem.model))
        assert gc.last is not None
        # Of single pairs chance may make them equal: four channels have sixteen masks.
        assert float(gc.last.cosine.mean()) < 1.0 - 1e-3, "the views have different masks"
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("form", ["gradient", "gram"])
@pytest.mark.parametrize(
    "name", ["mlp", "cnn_batchnorm_train", "conv2d_dilated_groups", "text_padding", "bare_parameters"]
)
def test_third_derivatives_are_right_or_an_error(name: str, form: Any) -> None:
    problem = {**CASES, **LAYER_CASES}[name].problem(pairs=2)
    parameters = compare.trainable(problem.model)
    found = []
    for engine in ("loop", GhostEngine(form=form)):
        gc = GradientConsistencyLoss(problem.model, engine=engine, fused=False)
        gradient = torch.autograd.grad(gc(*problem.views), parameters, create_graph=True, materialize_grads=True)
        squared = sum(part.square().sum() for part in gradient)
        try:
            third = torch.autograd.grad(squared, parameters, materialize_grads=True, allow_unused=True)
        except RuntimeError as error:
            assert engine != "loop", error  # noqa: PT017
            return
        found.append(torch.cat([part.flatten() for part in third]))
    assert compare.relative(found[1], found[0]) <= 1e-8
