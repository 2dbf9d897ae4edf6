"""P13 of the test plan: random projections are sketches of the per-sample gradients, by one matrix for both views."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from gradconsist import RandomProjection
from gradconsist.engines.projection import KINDS
from support import compare
from support.generated import Plan, apart, outcome, plans, with_views
from support.laws import law, same, within

SEEDS = st.integers(0, 10**6)


@law("P13", plan=plans(), kind=st.sampled_from(KINDS), dim=st.integers(2, 6), seed=SEEDS)
def test_p13_sketches(engine: str, plan: Plan, kind: Any, dim: int, seed: int) -> None:
    """What is compared is P g_w and P g_s, P as the projection itself writes it out; equal seeds give equal bits."""
    p, projection = plan.problem(), RandomProjection(dim, kind, seed=seed)
    found = outcome(p, engine=engine, projection=projection)
    again = outcome(p, engine=engine, projection=RandomProjection(dim, kind, seed=seed))
    same("cosine with the same seed", again.cosine, found.cosine)
    same("gradient with the same seed", again.gradient, found.gradient)
    if found.degenerate.any():  # a sketch of few numbers may vanish: counted, and told
        return
    matrix = projection.matrix([parameter.shape for parameter in compare.trainable(p.model)])
    verdict = p.judge(sketch=matrix.mv).verdict()
    within("cosine", compare.cosine_error(found.cosine, verdict.cosine), 1e-9)
    within("gradient", apart(found.gradient, verdict.flat), 1e-7)


@law("P13", plan=plans(), kind=st.sampled_from(KINDS), seed=SEEDS)
def test_p13_identical_views(engine: str, plan: Plan, kind: Any, seed: int) -> None:
    """One P for both views: identical views have cosine 1, whatever P is."""
    p = plan.problem()
    same_views = with_views(p, strong=p.weak.clone())
    found = outcome(same_views, engine=engine, projection=RandomProjection(3, kind, seed=seed))
    valid = found.cosine[~found.degenerate]
    within("cosine - 1", compare.worst((valid - 1).abs().tolist()), 1e-12)


@law("P13", plan=plans(), seed=SEEDS)
def test_p13_wide_kronecker_factors_are_exact(engine: str, plan: Plan, seed: int) -> None:
    """No weight is as wide as k: nothing is projected."""
    p = plan.problem()
    found = outcome(p, engine=engine, projection=RandomProjection(10**4, "kronecker", seed=seed))
    exact = outcome(p, engine=engine)
    within("cosine", compare.cosine_error(found.cosine, exact.cosine), 1e-11)
    within("gradient", apart(found.gradient, exact.gradient), 1e-9)
