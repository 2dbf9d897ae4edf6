"""Laws of a batch: pairs know nothing of each other but BatchNorm's statistics, whatever the order, number and chunks.

P1, P2, P8, P9, P10 of the test plan, and before them agreement with the oracle on models that hypothesis makes up.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from support import compare
from support.generated import Plan, apart, outcome, plans, rows, with_views
from support.laws import law, same, within
from support.zoo import CASES

ALONE = st.sampled_from(["none", "per sample", "running"])  # norms without statistics of the batch
DTYPES = st.sampled_from([torch.float32, torch.float64])
# In float64; what is compared differs by the order of sums only.
COSINE, LOSS, GRADIENT = 1e-11, 1e-11, 1e-9


@law("P0", plan=plans(), fused=st.booleans(), dtype=DTYPES, stop=st.sampled_from([None, None, "weak", "strong"]))
def test_p00_the_oracle(engine: str, plan: Plan, fused: bool, dtype: torch.dtype, stop: str | None) -> None:
    """Exactness on generated models, against the float64 loop that shares no code."""
    p = plan.problem(dtype)
    weight = torch.rand(plan.pairs, generator=torch.Generator().manual_seed(plan.seed)).round(decimals=1).to(dtype)
    verdict = p.judge(weight, stop_gradient=stop).verdict()
    found = outcome(p, weight, engine=engine, fused=fused, stop_gradient=stop, chunk_size=2)
    compared = weight > 0
    assert torch.equal(found.degenerate, verdict.degenerate & compared)
    cos_tol, grad_tol = compare.TOLERANCE[dtype]
    kind = str(dtype).removeprefix("torch.")
    # A float32 cosine is as good as its gradient is, whose entries may be rounding where the residual is small.
    expected = verdict.cosine.masked_fill(~compared, torch.nan)
    within(f"cosine, {kind}", compare.cosine_error(found.cosine, expected), cos_tol)
    within(f"gradient, {kind}", apart(found.gradient, verdict.flat), grad_tol)


@law("P1", plan=plans(pairs=5), order=st.permutations(range(5)))
def test_p01_permutation(engine: str, plan: Plan, order: list[int]) -> None:
    """The cosines follow the batch: bitwise in the loop, where no statistics of the batch are summed in its order."""
    p = plan.problem()
    first, moved = outcome(p, engine=engine), outcome(rows(p, order), engine=engine)
    same("cosine", moved.cosine, first.cosine[order], required=engine == "loop" and plan.independent)
    within("cosine", compare.cosine_error(moved.cosine, first.cosine[order]), COSINE)
    within("loss", abs(float(moved.loss - first.loss)), LOSS)
    within("gradient", apart(moved.gradient, first.gradient), GRADIENT)


@law(
    "P2",
    plan=plans(pairs=5, norm=st.sampled_from(["none", "per sample", "running"])),
    kept=st.sets(st.integers(0, 4), min_size=1),
)
def test_p02_composition(engine: str, plan: Plan, kept: set[int]) -> None:
    """Without batch statistics a pair knows nothing of the others: bitwise in the loop."""
    p, order = plan.problem(), sorted(kept)
    whole, part = outcome(p, engine=engine), outcome(rows(p, order), engine=engine)
    same("cosine", part.cosine, whole.cosine[order], required=engine == "loop")
    within("cosine", compare.cosine_error(part.cosine, whole.cosine[order]), COSINE)


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_p02_is_broken_by_batch_statistics(engine: str) -> None:
    """The negative control: with the joint statistics of a BatchNorm in train mode, the law does not hold."""
    p = CASES["cnn_batchnorm_train"].problem()
    whole, part = outcome(p, engine=engine), outcome(rows(p, [0, 2]), engine=engine)
    assert compare.cosine_error(part.cosine, whole.cosine[[0, 2]]) > 1e-3


@law("P8", plan=plans(pairs=st.integers(1, 3)), times=st.integers(2, 3))
def test_p08_duplicating_the_batch(engine: str, plan: Plan, times: int) -> None:
    """Mean loss and gradient unchanged; joint statistics too."""
    p = plan.problem()
    once, often = outcome(p, engine=engine), outcome(rows(p, list(range(plan.pairs)) * times), engine=engine)
    within("loss", abs(float(once.loss - often.loss)), LOSS)
    within("gradient", apart(often.gradient, once.gradient), GRADIENT)


@law("P9", plan=plans(pairs=5), fused=st.booleans(), dtype=DTYPES, chunk=st.sampled_from([1, 2, 3, 4, 5, 12, "auto"]))
def test_p09_chunks(engine: str, plan: Plan, fused: bool, dtype: torch.dtype, chunk: int | str) -> None:
    """Any number of pairs at a time, fused or not: bitwise the same cosines in the loop."""
    p = plan.problem(dtype)
    whole = outcome(p, engine=engine, chunk_size=None)
    parts = outcome(p, engine=engine, fused=fused, chunk_size=chunk)
    same("cosine", parts.cosine, whole.cosine, required=engine == "loop")
    eps = torch.finfo(dtype).eps
    within("cosine, units in the last place of 1", compare.cosine_error(parts.cosine, whole.cosine) / eps, 1e3)
    within("gradient / eps", apart(parts.gradient, whole.gradient) / eps, 1e5)


MASK = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0], dtype=torch.float64)
CONTENTS = [0.0, 1e3, 1e300, float("inf"), float("-inf"), float("nan")]


@law(
    "P10",
    plan=plans(
        pairs=5,
        norm=st.sampled_from(["none", "per sample", "running"]),
        body=st.sampled_from(["mlp", "conv1d", "conv2d", "attention"]),
    ),
    fused=st.booleans(),
    chunk=st.sampled_from([1, 2, None, "auto", "auto"]),
    first=st.sampled_from(CONTENTS),
    second=st.sampled_from(CONTENTS),
    ends=st.booleans(),
)
def test_p10_contents_of_weight_zero_pairs(
    engine: str, plan: Plan, fused: bool, chunk: int | str | None, first: float, second: float, ends: bool
) -> None:
    """Bitwise, in value and gradient: also NaN, infinity, unknown tokens, and what makes gradients overflow."""
    p, weight = plan.problem(), 1.0 - MASK.ceil() if ends else MASK  # the masked ones first and last, or inside
    masked = (weight == 0).nonzero().squeeze(1).tolist()
    before = outcome(p, weight, engine=engine, fused=fused, chunk_size=chunk)
    weak, strong, target = p.weak.clone(), p.strong.clone(), p.target.clone()
    if plan.body == "tokens":  # outside the vocabulary
        first, second = 10**6, -1
    weak[masked[0]], strong[masked[-1]] = first, second
    target[masked[0]] = target[masked[0]].flip(0) if plan.soft else (target[masked[0]] + 1) % 2
    after = outcome(with_views(p, weak, strong, target), weight, engine=engine, fused=fused, chunk_size=chunk)
    same("cosine", after.cosine, before.cosine)
    same("loss", after.loss, before.loss)
    same("gradient", after.gradient, before.gradient)
    assert bool(torch.isfinite(after.gradient).all())
