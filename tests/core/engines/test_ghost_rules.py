"""The parts of the ghost engine one by one, against torch's own derivatives and sums written as loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradconsist._forward.batchnorm import Statistics, affine
from gradconsist._refusals.graphs import name_of, nodes
from gradconsist.engines.ghost import conv, gram, pointwise, rules
from gradconsist.engines.ghost.decomposed import RECURRENT

DOUBLE = torch.float64
FEW = settings(max_examples=20, deadline=None)


def _normal(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    values = torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_(grad)


@st.composite
def layers(draw: Any, *, plain: bool = False) -> tuple[tuple[int, ...], tuple[int, ...], conv.Geometry]:
    """Input shape, weight shape and geometry of a convolution whose output is not empty.

    With `plain`, one whose inner products need no gradients: not transposed, and of one group if it has a stride.
    """
    dims = draw(st.integers(1, 2 if plain else 3))
    small = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, dilation = small(1, 3), small(1, 2)
    unit = plain and draw(st.booleans())  # half of them in the form that needs it
    stride, padding = (1,) * dims if unit else small(1, 3), small(0, 3)
    groups = 1 if plain and max(stride) > 1 else draw(st.integers(1, 2))
    transposed = not plain and draw(st.booleans())
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    output_padding: tuple[int, ...] = ()
    if transposed:
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        padding = tuple(min(p, r // 2) for p, r in zip(padding, reach, strict=True))
    size = tuple(max(1, r + 1 - 2 * p) + draw(st.integers(0, 2)) for r, p in zip(reach, padding, strict=True))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    first, second = (inputs, outputs) if transposed else (outputs, inputs)
    weight = (first, second // groups, *kernel)
    geometry = conv.Geometry(stride, padding, dilation, transposed, output_padding, groups)
    return (inputs, *size), weight, geometry


def _reference(x: Tensor, w: Tensor, g: conv.Geometry) -> Tensor:
    dims = len(g.stride)
    if g.transposed:
        function = getattr(F, f"conv_transpose{dims}d")
        return function(x, w, None, g.stride, g.padding, g.output_padding or 0, g.groups, g.dilation)
    return getattr(F, f"conv{dims}d")(x, w, None, g.stride, g.padding, g.dilation, g.groups)


@FEW
@given(layers())
def test_the_three_convolution_functions(layer: Any) -> None:
    """Each equals what torch computes, and is right in its first and second derivative."""
    inputs, weight, geometry = layer
    x, w = _normal(2, *inputs), _normal(*weight, seed=1)
    y = _reference(x, w, geometry)
    gy = _normal(*y.shape, seed=2)
    gx, gw = torch.autograd.grad(y, (x, w), gy)
    functions = (
        (lambda x, w: conv.Convolution.apply(x, w, geometry), (x, w), y),
        (lambda gy, w: conv.InputGradient.apply(gy, w, x.shape, geometry), (gy, w), gx),
        (lambda x, gy: conv.WeightGradient.apply(x, gy, w.shape, geometry), (x, gy), gw),
    )
    for function, arguments, expected in functions:
        assert torch.allclose(function(*arguments), expected, rtol=1e-10, atol=1e-12)
        assert gradcheck(function, arguments, fast_mode=True)
        assert gradgradcheck(function, arguments, fast_mode=True)


def test_the_first_stage_asks_for_no_weight_gradient() -> None:
    x, w = _normal(2, 3, 5), _normal(4, 3, 2)
    stage = conv.Stage(outputs_only=True)
    y = conv.Convolution.apply(x, w, conv.Geometry((1,), (0,), (1,)), stage)
    gx, gw = torch.autograd.grad(y.square().sum(), (x, w), retain_graph=True, allow_unused=True)
    assert gw is None
    stage.outputs_only = False
    again, gw = torch.autograd.grad(y.square().sum(), (x, w))
    assert torch.equal(gx, again)
    assert float(gw.norm()) > 0.1


@FEW
@given(layers(), st.integers(1, 2))
def test_sample_gradients_and_per_sample_convolution(layer: Any, maps: int) -> None:
    inputs, weight, geometry = layer
    samples = 3
    x, w = _normal(samples, maps, *inputs), _normal(samples, *weight, seed=1)
    y = torch.stack([_reference(x[i], w[i], geometry) for i in range(samples)])
    assert torch.allclose(conv.per_sample_convolution(x, w, geometry), y, rtol=1e-10, atol=1e-12)
    gy = _normal(*y.shape, seed=2, grad=False)
    (expected,) = torch.autograd.grad(y, w, gy)
    assert torch.allclose(conv.sample_gradients(x, gy, weight, geometry), expected, rtol=1e-10, atol=1e-12)
    rule = rules.ConvolutionWeight(weight, geometry)
    assert torch.allclose(rule.gradients(x, gy.flatten(0, 1)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (2, 2), (1, 4)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
@pytest.mark.parametrize("padding", ["same", "valid", 1, (0, 2), [1]])
def test_the_normal_form_of_a_call(kernel: tuple[int, int], dilation: Any, padding: Any) -> None:
    x, w = _normal(2, 2, 7, 11, grad=False), _normal(3, 2, *kernel, grad=False)
    expected = F.conv2d(x, w, None, 1, padding, dilation)
    padded, geometry = conv.normal_form(x, 2, 1, padding, dilation, 1, kernel=kernel)
    assert torch.allclose(conv.Convolution.apply(padded, w, geometry), expected, rtol=1e-10, atol=1e-12)


def _unfolded_products(x: Tensor, gy: Tensor, weight: tuple[int, ...], geometry: conv.Geometry) -> Tensor:
    """M from gradients that are sums over positions of d_t u_t^T, u_t the patch at t."""
    dims, groups = len(geometry.stride), geometry.groups
    kernel = weight[2:]
    padded = F.pad(x, [side for p in reversed(geometry.padding) for side in (p, p)])
    gradients = torch.zeros(len(x), *weight, dtype=x.dtype)
    c, p = x.shape[1] // groups, gy.shape[1] // groups
    for t in itertools.product(*map(range, gy.shape[2:])):
        for o in itertools.product(*map(range, kernel)):
            at = tuple(t[i] * geometry.stride[i] + o[i] * geometry.dilation[i] for i in range(dims))
            pixel_values, outputs = padded[(slice(None), slice(None), *at)], gy[(slice(None), slice(None), *t)]
            for g in range(groups):
                d, u = outputs[:, g * p : (g + 1) * p], pixel_values[:, g * c : (g + 1) * c]
                gradients[(slice(None), slice(g * p, (g + 1) * p), slice(None), *o)] += d[:, :, None] * u[:, None]
    return _pairs(gradients)


def _pairs(gradients: Tensor) -> Tensor:
    flat = gradients.reshape(len(gradients) // 2, 2, -1)
    return torch.stack([torch.stack([(a @ b) for b in pair]) for pair in flat for a in pair]).view(-1, 2, 2)


def _upper(m: Tensor) -> Tensor:
    """What is read of M: both squared norms and the upper product."""
    return torch.stack([m[:, 0, 0], m[:, 1, 1], m[:, 0, 1]], 1)


@FEW
@given(layers(plain=True))
def test_pixel_and_patch_form_against_unfolded_patches(layer: Any) -> None:
    inputs, weight, geometry = layer
    x = _normal(4, *inputs)
    gy = _normal(*_reference(x, _normal(*weight), geometry).shape, seed=2)
    rule = rules.ConvolutionWeight(weight, geometry)
    assert math.isfinite(rule.costs(x[:, None], gy)[1])
    form = lambda x, gy: _upper(rule.gram(x[:, None], gy))  # noqa: E731
    found, expected = form(x, gy), _upper(_unfolded_products(x, gy, weight, geometry))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    cotangent = _normal(*found.shape, seed=3, grad=False)
    ours = torch.autograd.grad(found, (x, gy), cotangent)
    theirs = torch.autograd.grad(expected, (x, gy), cotangent)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


class _Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operator returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(each.numel() for each in tree_leaves(found) if isinstance(each, Tensor))])
        return found


def test_a_dilation_beyond_the_map_takes_no_memory() -> None:
    """As in segmentation, whose last layers have dilations of up to 36: a padded Gram matrix would be 78^4 large."""
    x, weight = _normal(4, 2, 6, 6), (2, 2, 3, 3)
    rule = rules.ConvolutionWeight(weight, conv.Geometry((1, 1), (36, 36), (36, 36)))
    with _Largest() as largest:
        gram = rule.gram(x[:, None], _normal(4, 2, 6, 6))
        torch.autograd.grad(gram.sum(), x)
    assert largest.numbers <= 12 * 36**2  # three blocks per pair, of inputs and outputs


@pytest.mark.parametrize(
    "geometry",
    [
        conv.Geometry((2,), (0,), (1,), groups=2),
        conv.Geometry((1,), (0,), (1,), True),
        conv.Geometry((2,), (0,), (1,), True),
        conv.Geometry((2, 2, 2), (0, 0, 0), (1, 1, 1)),
    ],
)
def test_where_only_gradients_give_the_products(geometry: conv.Geometry) -> None:
    dims = len(geometry.stride)
    x, w = _normal(2, 1, 2, *[5] * dims, grad=False), (2, 2 // geometry.groups, *[3] * dims)
    rule = rules.ConvolutionWeight(w, geometry)
    d = _reference(x[:, 0], _normal(*w, grad=False), geometry)
    assert rule.gram(x, d) is None
    assert math.isinf(rule.costs(x, d)[1])
    folded = rules.ConvolutionWeight(w, conv.Geometry((1,), (0,), (1,)))
    assert folded.gram(_normal(2, 3, 2, 5), _normal(6, 2, 3)) is None, "several maps a sample"


@FEW
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_position_and_pair_gram_against_loops(pairs: int, positions: int, inputs: int, outputs: int) -> None:
    a, d = _normal(2 * pairs, positions, inputs), _normal(2 * pairs, positions, outputs, seed=1)
    gradients = torch.stack([sum(torch.outer(d[i, t], a[i, t]) for t in range(positions)) for i in range(len(a))])
    expected = _pairs(gradients)
    for found in (gram.position_gram(a, d), gram.pair_gram(gradients), gram.pair_gram(d.transpose(1, 2) @ a)):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert gradcheck(gram.position_gram, (a, d), fast_mode=True)
    assert gradcheck(gram.pair_gram, (a,), fast_mode=True)
    weak, strong = gradients[0::2].detach().requires_grad_(), gradients[1::2].detach().requires_grad_()
    assert torch.allclose(gram.pair_gram_of_two(weak, strong), expected, rtol=1e-10, atol=1e-12)
    for views in ((weak, strong), (weak.detach(), strong), (weak, strong.detach())):
        assert gradcheck(gram.pair_gram_of_two, views, fast_mode=True)
        assert gradgradcheck(gram.pair_gram_of_two, views, fast_mode=True)


def test_grams_are_float32_at_least() -> None:
    a = torch.full((2, 1, 301), 1.0, dtype=torch.bfloat16)  # an odd number above 256, which bfloat16 does not have
    assert gram.position_gram(a, a).dtype == torch.float32
    assert gram.position_gram(a, a).eq(301.0**2).all()
    assert gram.pair_gram(a).dtype == torch.float32
    assert gram.pair_gram(a)[0].eq(301.0).all()
    assert gram.pair_gram(a.double()).dtype == DOUBLE


@FEW
@given(st.integers(1, 3), st.integers(1, 5))
def test_embedding_against_dense_one_hot(pairs: int, positions: int) -> None:
    ids = torch.randint(4, (2 * pairs, positions), generator=torch.Generator().manual_seed(positions))
    d = _normal(2 * pairs, positions, 3)
    rows = F.one_hot(ids, 4).to(DOUBLE)
    expected = rows.transpose(1, 2) @ d
    rule = rules.EmbeddingWeight((4, 3))
    assert torch.allclose(rule.gradients(ids, d), expected, rtol=1e-12, atol=1e-14)
    found = rule.gram(ids, d)
    assert found is not None
    assert torch.allclose(_upper(found), _upper(_pairs(expected)), rtol=1e-10, atol=1e-12)
    assert gradcheck(lambda d: _upper(rule.gram(ids, d)), (d,), fast_mode=True)


@FEW
@given(st.integers(1, 3), st.integers(2, 5))
def test_standardize(count: int, size: int) -> None:
    """Right in first and second derivative, with respect to both results."""
    x = _normal(count, size)
    function = lambda x: pointwise.Standardize.apply(x, 0.1)  # noqa: E731
    y, r = function(x)
    assert torch.allclose(y, F.layer_norm(x, (size,), eps=0.1), rtol=1e-10)
    assert torch.allclose(r, (x.var(1, correction=0, keepdim=True) + 0.1).rsqrt(), rtol=1e-12)
    assert gradcheck(function, (x,))
    for part in (function, lambda x: function(x)[0], lambda x: function(x)[1]):
        assert gradgradcheck(part, (x,))


def test_affine_maps_center_before_they_scale() -> None:
    """x * scale + (shift - mean * scale) would lose the digits of a mean that is large against the deviation."""
    x, scale, shift = 4096.0 + torch.randint(-64, 64, (4, 3, 5)) / 64.0, torch.rand(3) + 0.7, torch.randn(3)
    expected = (x - 4096.0) * (2.0 * scale[:, None]) + shift[:, None]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            found = affine(x, Statistics(torch.full((3,), 4096.0), torch.full((3,), 0.25)), scale, shift, 0.0)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_leaky_relu(slope: float) -> None:
    x = torch.tensor([-2.0, -0.3, 0.4, 3.0], dtype=DOUBLE, requires_grad=True)
    function = lambda x: pointwise.LeakyRelu.apply(x, slope)  # noqa: E731
    assert torch.equal(function(x), F.leaky_relu(x, slope))
    assert gradcheck(function, (x,))
    assert gradgradcheck(function, (x,))
    at_zero = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
    (ours,) = torch.autograd.grad(function(at_zero), at_zero)
    stock = F.leaky_relu(at_zero, slope) if slope else F.relu(at_zero)
    assert torch.equal(ours, torch.autograd.grad(stock, at_zero)[0]), "the value that torch takes at the kink"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_dropout_lies_between_layers_and_nowhere_else(kind: type[nn.RNNBase]) -> None:
    """With a probability of 1 nothing is left to chance: the second layer sees zeros, and its output is kept."""
    rnn, x = kind(4, 5, num_layers=2, dropout=1.0).double(), _normal(3, 2, 4)
    h = torch.zeros(2, 2, 5, dtype=DOUBLE)
    function = {nn.LSTM: torch.lstm, nn.GRU: torch.gru, nn.RNN: torch.rnn_tanh}[kind]
    arguments = (x, (h, h) if kind is nn.LSTM else h, rnn._flat_weights, True, 2, 1.0, True, False, False)
    ours = RECURRENT[function](*arguments)
    for found, expected in zip(ours, function(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # A step that is indexed has a gradient as long as the sequence, so the work would grow with its square.
    assert not [node for node in nodes(*ours) if "Select" in name_of(node)]
