"""Every engine with a projection, against the oracle's per-sample gradients times the documented matrix."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss, RandomProjection
from gradconsist.diagnostics import check
from gradconsist.engines import AutoEngine, GhostEngine, LoopEngine, register_rule, unregister_rule
from gradconsist.engines.ghost.conv import Geometry
from gradconsist.engines.ghost.rules import Bias, ConvolutionWeight, EmbeddingWeight, LinearWeight
from gradconsist.engines.ghost.sketch import of_use
from gradconsist.engines.projection import KINDS
from support import compare
from support.layer_zoo import LAYER_CASES
from support.oracle import Judge, Verdict
from support.zoo import CASES, Problem

ALL = {**CASES, **LAYER_CASES}
ENGINE = pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])

# What each model is there for, and the settings that it is run with: (kind, fused, chunk_size, stop_gradient).
MODELS: dict[str, tuple[str, bool, int | str | None, str | None]] = {
    "mlp": ("gaussian", True, 3, None),
    "mlp_encoder": ("gaussian", False, None, "weak"),  # a part of the parameters
    "cnn_batchnorm_train": ("kronecker", True, 3, None),  # constants of joint statistics
    "wrn_slice": ("gaussian", True, "auto", None),
    "vit": ("kronecker", False, 3, "strong"),  # bare parameters, attention
    "tied_embedding": ("kronecker", True, None, None),  # one weight as embedding and as linear layer: cross terms
    "reused_linear": ("kronecker", True, 1, "weak"),
    "bare_parameters": ("gaussian", False, 3, None),
    "conv_grouped": ("kronecker", False, None, None),
    "conv_depthwise": ("kronecker", True, 3, "strong"),
    "conv_transposed": ("kronecker", True, 1, None),
    "conv_dilated": ("gaussian", True, None, None),
    "frozen_subset": ("kronecker", True, 3, None),
    "text_dict": ("kronecker", True, 3, None),
    "lstm": ("kronecker", False, 3, None),  # vmap refuses it
}


def _compared(problem: Problem) -> list[Tensor]:
    encoder = problem.case.encoder or (lambda name: True)
    return [p for name, p in problem.model.named_parameters() if p.requires_grad and encoder(name)]


@functools.cache
def _verdict(name: str, kind: Any, stop: str | None, dtype: torch.dtype = torch.float64) -> Verdict:
    problem = ALL[name].problem(dtype=dtype)
    matrix = RandomProjection(2, kind, seed=11).matrix([p.shape for p in _compared(problem)])
    return problem.judge(stop_gradient=stop, sketch=matrix.mv).verdict()


def _check(name: str, kind: Any, dtype: torch.dtype = torch.float64, **options: Any) -> None:
    problem = ALL[name].problem(dtype=dtype)
    gc = GradientConsistencyLoss(
        problem.model, encoder=problem.case.encoder, loss_fn=problem.case.loss_fn,
        projection=RandomProjection(2, kind, seed=11), **options,
    )  # fmt: skip
    verdict = _verdict(name, kind, options.get("stop_gradient"), dtype)
    compare.assert_exact(gc, problem.views, verdict)
    record = gc.measure(*problem.views)
    assert compare.cosine_error(record.cosine, verdict.cosine) <= compare.TOLERANCE[dtype][0]
    assert compare.relative(record.norm_weak, verdict.norm_weak) <= compare.TOLERANCE[dtype][1]


@ENGINE
@pytest.mark.parametrize("name", MODELS)
def test_engines_agree_with_the_projected_oracle(name: str, engine: str) -> None:
    kind, fused, chunk_size, stop = MODELS[name]
    if getattr(ALL[name], engine, "exact") != "refused":
        _check(name, kind, engine=engine, fused=fused, chunk_size=chunk_size, stop_gradient=stop)


@ENGINE
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_engine_and_chunk(kind: str, engine: str) -> None:
    for chunk_size, fused in ((1, True), (3, False)):
        _check("conv_grouped", kind, engine=engine, chunk_size=chunk_size, fused=fused)
    _check("mlp_layernorm", kind, torch.float32, engine=engine)


@pytest.mark.parametrize("kind", KINDS)
def test_the_automatic_engine_falls_back_to_the_same_projection(kind: str) -> None:
    engine = AutoEngine()
    _check("data_dependent", kind, engine=engine)
    assert isinstance(engine.engine, LoopEngine)


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_different_lengths(kind: Any) -> None:
    """The ghost engine sees them one by one."""
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))
    model = model.double()
    weak, strong = torch.randn(4, 3, 9).double(), torch.randn(4, 3, 7).double()
    target, projection = torch.tensor([0, 1, 2, 0]), RandomProjection(2, kind)
    gradients = []
    for engine in ("loop", "ghost"):
        loss = GradientConsistencyLoss(model, engine=engine, projection=projection)(weak, strong, target)
        gradients.append(compare.gradient_of(loss, model))
    assert compare.relative(gradients[1], gradients[0]) <= 1e-10


@ENGINE
def test_weights_subset_and_reduction_stay_inside(engine: str) -> None:
    """With `max_pairs` the same pairs as without a projection, and weights and reduction as ever."""
    weight = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.25], dtype=torch.float64)
    problem = CASES["mlp"].problem()
    projection = RandomProjection(2, seed=4)
    matrix = projection.matrix([p.shape for p in _compared(problem)])
    verdict = problem.judge(weight, reduction="sum", sketch=matrix.mv).verdict()
    gc = GradientConsistencyLoss(problem.model, engine=engine, reduction="sum", projection=projection)
    gradient = compare.gradient_of(gc(*problem.views, weight), problem.model)
    assert compare.relative(gradient, verdict.flat) <= 1e-8
    drawn = []
    for option in (None, projection):
        gc = GradientConsistencyLoss(problem.model, engine=engine, max_pairs=2, projection=option)
        gc(*problem.views, generator=torch.Generator().manual_seed(0))
        drawn.append(gc.last.compared)
    assert torch.equal(*drawn)


def test_half_precision_forward() -> None:
    """Sketches of gradients that autocast makes bfloat16 are taken in float32: as close as the exact products are."""
    problem = CASES["cnn_batchnorm_train"].problem(dtype=torch.float32)
    for projection in (None, RandomProjection(2), RandomProjection(5, "gaussian")):
        gc = GradientConsistencyLoss(problem.model, projection=projection)
        full = gc.measure(*problem.views).cosine
        with torch.autocast("cpu", dtype=torch.bfloat16):
            record = gc.measure(*problem.views)
        assert record.cosine.dtype == torch.float32
        assert float((record.cosine - full).abs().max()) <= 5e-2


# Identical views, and projections wider than every weight: properties/test_projections.py.
GEOMETRIES = {
    "1d": ((6, 4, 3), (9,), Geometry((1,), (1,), (1,)), 1),
    "strided, dilated": ((6, 4, 3, 2), (9, 8), Geometry((2, 1), (1, 0), (1, 2)), 1),
    "groups": ((6, 2, 3, 3), (7, 7), Geometry((1, 2), (1, 1), (1, 1), groups=3), 1),
    "3d, several maps a sample": ((4, 3, 2, 2, 2), (4, 3, 3), Geometry((1,) * 3, (0,) * 3, (1,) * 3), 2),
    "transposed": ((4, 5, 3, 3), (4, 5), Geometry((1, 1), (1, 1), (1, 1), transposed=True, output_padding=(0, 0)), 1),
    "transposed, strided, groups": (
        (6, 3, 3, 3), (4, 5), Geometry((2, 3), (1, 0), (1, 1), transposed=True, output_padding=(1, 2), groups=2), 1,
    ),
    "transposed, output padding beyond the stride": (
        (4, 3, 3), (5,), Geometry((1,), (1,), (3,), transposed=True, output_padding=(2,)), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GEOMETRIES)
def test_factors_of_convolutions_against_formed_gradients(name: str) -> None:
    shape, size, geometry, maps = GEOMETRIES[name]
    channels = shape[0] if geometry.transposed else shape[1] * geometry.groups
    x = torch.randn(3, maps, channels, *size, dtype=torch.float64, requires_grad=True)
    y = torch.convolution(x.flatten(0, 1), torch.zeros(shape).double(), None, *geometry.arguments())
    d = torch.randn(y.shape, dtype=torch.float64, requires_grad=True)
    _against_formed(ConvolutionWeight(shape, geometry), x, d, torch.Size(shape))


def test_factors_of_linear_layers_and_embeddings_against_formed_gradients() -> None:
    x, d = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(15, 7, dtype=torch.float64)
    _against_formed(LinearWeight(), x.requires_grad_(), d.requires_grad_(), torch.Size((7, 4)))
    _against_formed(LinearWeight(transposed=True), x, d, torch.Size((4, 7)))
    ids = torch.tensor([[1, 2, 2], [0, 4, 1]])
    d = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    _against_formed(EmbeddingWeight((5, 4)), ids, d, torch.Size((5, 4)))
    with pytest.raises(ValueError, match="this rule needs the layer's input"):
        of_use(ConvolutionWeight((4, 4, 3), Geometry((1,), (0,), (1,))), None, d, torch.Size((4, 4, 3)), 0,
               RandomProjection(2).projector())  # fmt: skip


def _against_formed(rule: Any, x: Tensor, d: Tensor, shape: torch.Size) -> None:
    """Values and both derivatives of the factored sketch against L G R^T of the gradient that the rule forms."""
    projector = RandomProjection(2, seed=8).projector()
    left, right = projector.factors(shape, 3, torch.float64, torch.device("cpu"))
    formed = torch.einsum("kn,inm,lm->ikl", left, rule.gradients(x, d).flatten(2), right)
    found = of_use(rule, x, d, shape, 3, projector)
    assert compare.relative(found, formed) <= 1e-12
    cotangent, wanted = torch.randn_like(found), [leaf for leaf in (x, d) if leaf.requires_grad]
    for mine, theirs in zip(*(torch.autograd.grad(s, wanted, cotangent) for s in (found, formed)), strict=True):
        assert compare.relative(mine, theirs) <= 1e-12


class _Squared(nn.Module):
    """A layer with a rule of the user's: y = (W x)^2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).square()


@pytest.mark.parametrize("kind", KINDS)
def test_a_registered_rule_is_projected_too(kind: Any) -> None:
    model = nn.Sequential(_Squared(), nn.Linear(6, 3)).double()
    weak, strong, target = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    projection = RandomProjection(2, kind)
    matrix = projection.matrix([p.shape for p in model.parameters()])
    verdict = Judge(model, weak, strong, target, sketch=matrix.mv).verdict()
    register_rule(_Squared, lambda m, x, d: {"weight": (2 * (x @ m.weight.T) * d).unsqueeze(2) * x.unsqueeze(1)})
    try:
        loss = GradientConsistencyLoss(model, engine="ghost", projection=projection)(weak, strong, target)
        report = check(GradientConsistencyLoss(model, projection=projection), weak, strong, target)
    finally:
        unregister_rule(_Squared)
    assert compare.relative(compare.gradient_of(loss, model), verdict.flat) <= 1e-8
    assert report.rows[0].route == "registered rule of _Squared, gradient projected"


def test_check_tells_what_is_projected() -> None:
    problem = CASES["tied_embedding"].problem()
    report = check(GradientConsistencyLoss(problem.model, projection=RandomProjection(2, seed=1)), *problem.views)
    routes = {row.parameter: row.route for row in report.rows}
    assert routes["embedding.weight"] == "embedding, factors projected + linear, factors projected (2 uses as one)"
    assert str(report).startswith("inner products unbiased by RandomProjection(dim=2, kind='kronecker', seed=1")
    assert all("projected" in route for name, route in routes.items() if name.endswith("weight"))
    problem = CASES["bare_parameters"].problem()
    report = check(GradientConsistencyLoss(problem.model, projection=RandomProjection(3, "gaussian")), *problem.views)
    assert all("projected" in row.route for row in report.rows)
    report = check(
        GradientConsistencyLoss(problem.model, engine="vmap", projection=RandomProjection(3, "gaussian")),
        *problem.views,
    )
    assert report.ok
    assert report.engine == "VmapEngine()"


def test_a_bias_is_not_projected_by_factors() -> None:
    d = torch.randn(3, 4, dtype=torch.float64)
    projector = RandomProjection(2).projector()
    assert not projector.shrinks((4,))
    assert torch.equal(of_use(Bias(-1, 1), None, d, torch.Size((4,)), 0, projector), d)


def test_the_ghost_engine_does_not_form_what_it_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the gradients of linear layers and convolutions out of reach it still answers."""

    def forbidden(*_: Any) -> Tensor:
        raise AssertionError("a gradient was formed")

    problem = CASES["conv_grouped"].problem()
    gc = GradientConsistencyLoss(problem.model, engine=GhostEngine(form="gram"), projection=RandomProjection(2))
    for rule in (LinearWeight, ConvolutionWeight):
        monkeypatch.setattr(rule, "gradients", forbidden)
    gc(*problem.views).backward()
