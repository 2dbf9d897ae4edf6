"""Laws that hold whatever the numbers, by hypothesis.  The labels P1..P12 are those of the test plan."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradconsist import GradientConsistencyLoss
from support import compare
from support.zoo import CASES, Problem

MODELS = st.sampled_from(["mlp", "cnn_groupnorm", "vit", "tied_embedding", "conv_grouped"])
ENGINES = st.sampled_from(["loop", "vmap", "ghost"])
SEEDS = st.integers(0, 10_000)
LAW = settings(
    derandomize=True, deadline=None, max_examples=15, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def run(p: Problem, weight: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, loss and flat gradient."""
    gc = GradientConsistencyLoss(p.model, **options)
    loss = gc(*p.views, weight)
    return gc.last.cosine, loss.detach(), compare.gradient_of(loss, p.model)


def reordered(p: Problem, order: list[int]) -> Problem:
    return Problem(p.case, p.model, p.weak[order], p.strong[order], p.target[order])


@LAW
@given(name=MODELS, engine=ENGINES, seed=SEEDS, order=st.permutations(range(5)))
def test_p1_permutation(name: str, engine: str, seed: int, order: list[int]) -> None:
    """The cosines follow the batch; bitwise in the loop, one sample at a time."""
    p = CASES[name].problem(seed=seed)
    cosine, loss, gradient = run(p, engine=engine, chunk_size=1)
    moved, loss_moved, gradient_moved = run(reordered(p, order), engine=engine, chunk_size=1)
    if engine == "loop":
        assert torch.equal(moved, cosine[order])
    torch.testing.assert_close(moved, cosine[order], rtol=0.0, atol=1e-10)
    torch.testing.assert_close(loss_moved, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_moved, gradient, rtol=1e-8, atol=1e-10)


@LAW
@given(name=MODELS, engine=ENGINES, seed=SEEDS, kept=st.sets(st.integers(0, 4), min_size=1))
def test_p2_composition(name: str, engine: str, seed: int, kept: set[int]) -> None:
    """Without batch statistics a pair knows nothing of the others."""
    p, order = CASES[name].problem(seed=seed), sorted(kept)
    torch.testing.assert_close(
        run(reordered(p, order), engine=engine)[0], run(p, engine=engine)[0][order], rtol=0.0, atol=1e-10
    )


@LAW
@given(name=st.sampled_from(["mlp", "cnn_batchnorm_train", "vit"]), engine=ENGINES, seed=SEEDS)
def test_p3_symmetry(name: str, engine: str, seed: int) -> None:
    """Exchanging the views changes neither value nor gradient, and exchanges the stopped view."""
    p = CASES[name].problem(seed=seed)
    swapped = Problem(p.case, p.model, p.strong, p.weak, p.target)
    first, second = run(p, engine=engine), run(swapped, engine=engine)
    torch.testing.assert_close(first[0], second[0], rtol=0.0, atol=1e-12)
    torch.testing.assert_close(first[2], second[2], rtol=1e-9, atol=1e-11)
    stopped = run(p, engine=engine, stop_gradient="weak")[2]
    torch.testing.assert_close(stopped, run(swapped, engine=engine, stop_gradient="strong")[2], rtol=1e-9, atol=1e-11)


@LAW
@given(engine=ENGINES, seed=SEEDS, power=st.integers(-10, 20), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_p4_scaling_the_loss(engine: str, seed: int, power: int, dtype: torch.dtype) -> None:
    """c = 2^k on every per-sample loss: cosines, value and gradient bitwise the same."""
    p = CASES["mlp"].problem(seed=seed, dtype=dtype)
    plain = lambda z, t: F.cross_entropy(z, t, reduction="none")  # noqa: E731
    scaled = lambda z, t: 2.0**power * F.cross_entropy(z, t, reduction="none")  # noqa: E731
    first, second = run(p, engine=engine, loss_fn=plain), run(p, engine=engine, loss_fn=scaled)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[2], second[2], rtol=compare.TOLERANCE[dtype][1], atol=1e-7)


@LAW
@given(engine=ENGINES, seed=SEEDS)
def test_p5_sign(engine: str, seed: int) -> None:
    """The negative loss has the negative gradients, on both views alike: bitwise the same cosine."""
    p = CASES["mlp"].problem(seed=seed)
    found = []
    for sign in (1, -1):
        gc = GradientConsistencyLoss(
            p.model, engine=engine, loss_fn=lambda z, t, sign=sign: sign * F.cross_entropy(z, t, reduction="none")
        )
        gc(*p.views)
        found.append(gc.last.cosine)
    torch.testing.assert_close(found[1], found[0], rtol=0.0, atol=0.0)


@LAW
@given(name=MODELS, engine=ENGINES, seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_p6_bounds(name: str, engine: str, seed: int, dtype: torch.dtype) -> None:
    """-1 <= cos <= 1 exactly, and so 0 <= L_g <= 2, also on nearly identical views."""
    p = CASES[name].problem(seed=seed, dtype=dtype)
    close = Problem(p.case, p.model, p.weak, p.weak.clone(), p.target)
    for problem in (p, close):
        cosine, loss, _ = run(problem, engine=engine)
        assert ((cosine >= -1) & (cosine <= 1)).all()
        assert 0 <= float(loss.detach()) <= 2


@LAW
@given(
    name=st.sampled_from(["mlp", "cnn_batchnorm_train", "vit", "dropout"]),
    engine=ENGINES,
    seed=SEEDS,
    fused=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_p7_identical_views(name: str, engine: str, seed: int, fused: bool, dtype: torch.dtype) -> None:
    """Cosine 1, loss 0 and gradient 0: the zero gradient catches a graph that is detached by half."""
    p = CASES[name].problem(seed=seed, dtype=dtype)
    usual = run(p, engine=engine, fused=fused)[2].norm()
    same = Problem(p.case, p.model, p.weak, p.weak.clone(), p.target)
    cosine, loss, gradient = run(same, engine=engine, fused=fused)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0.0, atol=tolerance)
    assert abs(float(loss.detach())) <= tolerance
    assert float(gradient.norm()) <= 10 * tolerance * max(float(usual), 1.0)


@LAW
@given(name=st.sampled_from(["mlp", "cnn_batchnorm_train"]), engine=ENGINES, seed=SEEDS, times=st.integers(2, 3))
def test_p8_duplicating_the_batch(name: str, engine: str, seed: int, times: int) -> None:
    """Mean loss and gradient unchanged; joint statistics too."""
    p = CASES[name].problem(seed=seed)
    first, second = run(p, engine=engine), run(reordered(p, list(range(5)) * times), engine=engine)
    torch.testing.assert_close(first[1], second[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first[2], second[2], rtol=1e-8, atol=1e-10)


@LAW
@given(
    name=st.sampled_from(["mlp", "cnn_batchnorm_train"]),
    engine=ENGINES,
    fused=st.booleans(),
    seed=SEEDS,
    chunk_size=st.sampled_from([1, 2, 3, 4, 5, 12, None, "auto"]),
)
def test_p9_chunks(name: str, engine: str, fused: bool, seed: int, chunk_size: int | str | None) -> None:
    p = CASES[name].problem(seed=seed)
    whole, parts = run(p, engine=engine, chunk_size=None), run(p, engine=engine, fused=fused, chunk_size=chunk_size)
    torch.testing.assert_close(whole[0], parts[0], rtol=0.0, atol=1e-11)
    torch.testing.assert_close(whole[2], parts[2], rtol=1e-8, atol=1e-11)


@LAW
@given(
    name=st.sampled_from(["mlp", "cnn_groupnorm", "vit"]),
    engine=ENGINES,
    fused=st.booleans(),
    seed=SEEDS,
    scale=st.sampled_from([0.0, 1e3, 1e300]),
)
def test_p10_contents_of_weight_zero_pairs(name: str, engine: str, fused: bool, seed: int, scale: float) -> None:
    """Bitwise: also where their gradient would be zero or overflow."""
    p, weight = CASES[name].problem(seed=seed), torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    first = run(p, weight, engine=engine, fused=fused, chunk_size=2)
    p.weak[1] *= scale
    p.strong[3] *= scale
    p.target[1] = (p.target[1] + 1) % 3
    second = run(p, weight, engine=engine, fused=fused, chunk_size=2)
    assert torch.equal(first[0].nan_to_num(9.0), second[0].nan_to_num(9.0))
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


@LAW
@given(seed=SEEDS, engine=ENGINES)
def test_p11_rotating_the_input(seed: int, engine: str) -> None:
    """x -> Qx and W -> W Q^T for orthogonal Q: the same function, the same geometry of gradients."""
    p = CASES["mlp"].problem(seed=seed)
    first = run(p, engine=engine)
    q, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).double())
    with torch.no_grad():
        p.model[0].weight.copy_(p.model[0].weight @ q.T)
    second = run(Problem(p.case, p.model, p.weak @ q.T, p.strong @ q.T, p.target), engine=engine)
    torch.testing.assert_close(first[0], second[0], rtol=0.0, atol=1e-10)
    torch.testing.assert_close(first[2].norm(), second[2].norm(), rtol=1e-8, atol=0.0)


@LAW
@given(seed=SEEDS, engine=ENGINES, layers=st.sets(st.sampled_from([0, 2, 4]), min_size=1))
def test_p12_inner_products_add_up_over_layers(seed: int, engine: str, layers: set[int]) -> None:
    """|g|^2 and <g_w, g_s> over a set of layers are sums over its members; a frozen layer takes its term away."""
    p = CASES["mlp"].problem(seed=seed)

    def products(chosen: set[int]) -> Tensor:
        record = GradientConsistencyLoss(p.model, encoder=[p.model[i] for i in chosen], engine=engine).measure(*p.views)
        cross = record.cosine.nan_to_num(0.0) * record.norm_weak * record.norm_strong
        return torch.stack([record.norm_weak.square(), record.norm_strong.square(), cross])

    total = products(layers)
    torch.testing.assert_close(total, sum(products({i}) for i in sorted(layers)), rtol=1e-9, atol=1e-11)
    for index in {0, 2, 4} - layers:
        p.model[index].requires_grad_(False)
    frozen = GradientConsistencyLoss(p.model, engine=engine).measure(*p.views)
    torch.testing.assert_close(frozen.norm_weak.square(), total[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_the_value_is_reproducible(engine: str) -> None:
    """The same call twice, bitwise."""
    p = CASES["cnn_batchnorm_train"].problem(dtype=torch.float32)
    first, second = run(p, engine=engine), run(p, engine=engine)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
