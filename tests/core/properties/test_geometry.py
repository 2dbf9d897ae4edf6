"""Laws of the cosine: views exchanged, scaled, reflected, identical; bases rotated; layers added up.

P3, P4, P5, P6, P7, P11, P12 of the test plan.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import gradconsist._consistency.comparison
from gradconsist import GradientConsistencyLoss
from support import compare
from support.generated import Plan, apart, outcome, plans, with_views
from support.laws import law, same, within
from support.models import Layers
from support.zoo import CASES, Problem

DTYPES = st.sampled_from([torch.float32, torch.float64])
SEEDS = st.integers(0, 10**6)
MLPS = ["mlp", "mlp_soft_target", "mlp_batchnorm1d"]


@law("P3", plan=plans())
def test_p03_symmetry(engine: str, plan: Plan) -> None:
    """Exchanging the views exchanges the norms and the stopped view, and changes neither value nor gradient.

    Not bit for bit: cross / |g_w| / |g_s| divides in another order, and joint statistics are summed in another one.
    """
    p = plan.problem()
    swapped = with_views(p, p.strong, p.weak)
    first, second = outcome(p, engine=engine), outcome(swapped, engine=engine)
    same("cosine", second.cosine, first.cosine, required=False)
    bound = 4 * torch.finfo(torch.float64).eps if engine == "loop" and plan.independent else 1e-11
    within("cosine", compare.cosine_error(second.cosine, first.cosine), bound)
    within("gradient", apart(second.gradient, first.gradient), 1e-9)
    weak = outcome(p, engine=engine, stop_gradient="weak")
    strong = outcome(swapped, engine=engine, stop_gradient="strong")
    within("gradient, one view stopped", apart(strong.gradient, weak.gradient), 1e-9)


def scaled_loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return output["factor"] * F.cross_entropy(output["logits"], target, reduction="none")


def scaled(p: Problem, engine: str, weak: float, strong: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine, loss and gradient where the weak view's loss is multiplied by `weak`, the strong one's by `strong`.

    The input brings the factor for the loss, so that each view can be scaled alone.
    """
    model = Layers(lambda m, x, factor: {"logits": m.model(x), "factor": factor}, model=p.model)
    factors = [torch.full([len(p.target)], factor, dtype=p.weak.dtype) for factor in (weak, strong)]
    gc = GradientConsistencyLoss(model, loss_fn=scaled_loss, engine=engine, min_norm=1e-14)
    loss = gc((p.weak, factors[0]), (p.strong, factors[1]), p.target)
    return gc.last.cosine, loss.detach(), compare.gradient_of(loss, p.model)


FLOATS = plans(body=st.sampled_from(["mlp", "conv1d", "conv2d", "attention"]), width=3)
POWERS = st.integers(-8, 12)


@law("P4", plan=FLOATS, weak=POWERS, strong=POWERS, dtype=DTYPES)
def test_p04_scaling_the_loss(engine: str, plan: Plan, weak: int, strong: int, dtype: torch.dtype) -> None:
    """Powers of two, another one for each view: bitwise the same cosine, value and gradient in every engine."""
    p = plan.problem(dtype)
    plain, moved = scaled(p, engine, 1.0, 1.0), scaled(p, engine, 2.0**weak, 2.0**strong)
    same("cosine", moved[0], plain[0])
    same("loss", moved[1], plain[1])
    same("gradient", moved[2], plain[2])


@law("P4", plan=FLOATS, weak=st.floats(1e-3, 1e3), strong=st.floats(1e-3, 1e3))
def test_p04_scaling_by_any_number(engine: str, plan: Plan, weak: float, strong: float) -> None:
    """The same, to rounding, for factors that round."""
    p = plan.problem()
    plain, moved = scaled(p, engine, 1.0, 1.0), scaled(p, engine, weak, strong)
    within("cosine", compare.cosine_error(moved[0], plain[0]), 1e-11)
    within("gradient", apart(moved[2], plain[2]), 1e-9)


@law("P5", plan=FLOATS, dtype=DTYPES)
def test_p05_sign(engine: str, plan: Plan, dtype: torch.dtype) -> None:
    """One view's loss times -1 negates the cosine and the term's gradient, both views' changes nothing: bitwise."""
    p = plan.problem(dtype)
    plain, one, both = scaled(p, engine, 1.0, 1.0), scaled(p, engine, 1.0, -1.0), scaled(p, engine, -1.0, -1.0)
    same("cosine, one view", one[0], -plain[0])
    same("cosine, both views", both[0], plain[0])
    same("gradient, one view", one[2], -plain[2])
    same("gradient, both views", both[2], plain[2])


@law("P6", plan=plans(), dtype=DTYPES, nearness=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0]))
def test_p06_bounds(engine: str, plan: Plan, dtype: torch.dtype, nearness: float) -> None:
    """-1 <= cos <= 1 exactly, so 0 <= L_g <= 2; before the clamp, rounding leaves by a few units in the last place."""
    p = plan.problem(dtype)
    if p.weak.is_floating_point():
        p = with_views(p, strong=torch.lerp(p.weak, p.strong, nearness))
    seen: list[Any] = []

    def spy(products: Any, degenerate: Tensor) -> Tensor:
        seen.append((products.cross / (products.weak * products.strong).sqrt())[~degenerate].detach())
        return real(products, degenerate)

    real = gradconsist._consistency.comparison.cosine
    with mock.patch.object(gradconsist._consistency.comparison, "cosine", spy):
        found = outcome(p, engine=engine)
    valid = found.cosine[~found.degenerate]
    assert bool(((valid >= -1) & (valid <= 1)).all())
    assert 0 <= float(found.loss) <= 2
    excess = max([float((part.abs() - 1).max()) for part in seen if len(part)] + [0.0])
    within("excess before the clamp / eps", excess / torch.finfo(dtype).eps, 4.0)


@law("P7", plan=plans(), fused=st.booleans(), dtype=DTYPES)
def test_p07_identical_views(engine: str, plan: Plan, fused: bool, dtype: torch.dtype) -> None:
    """Cosine 1, loss 0 and gradient 0: the zero gradient catches a graph that is detached by half."""
    p = plan.problem(dtype)
    usual = outcome(p, engine=engine, fused=fused).gradient.norm()
    found = outcome(with_views(p, strong=p.weak.clone()), engine=engine, fused=fused)
    valid = found.cosine[~found.degenerate]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    kind = str(dtype).removeprefix("torch.")
    within(f"cosine - 1, {kind}", compare.worst((valid - 1).abs().tolist()), tolerance)
    within(f"loss, {kind}", abs(float(found.loss)), tolerance)
    within(f"gradient over the usual one, {kind}", float(found.gradient.norm() / usual.clamp(min=1.0)), tolerance)


@law("P11", plan=plans(body="mlp", frozen_stem=False))
def test_p11_rotating_the_input(engine: str, plan: Plan) -> None:
    """x -> Qx and W -> W Q^T for orthogonal Q: the same function, the same geometry of gradients."""
    p = plan.problem()
    first = outcome(p, engine=engine)
    generator = torch.Generator().manual_seed(plan.seed)
    q, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        p.model[0].weight.copy_(p.model[0].weight @ q.T)
    second = outcome(with_views(p, p.weak @ q.T, p.strong @ q.T), engine=engine)
    stem = p.model[0].weight.numel()
    back = torch.cat([(second.gradient[:stem].view(-1, 5) @ q).flatten(), second.gradient[stem:]])
    within("cosine", compare.cosine_error(second.cosine, first.cosine), 1e-10)
    within("gradient, rotated back", apart(back, first.gradient), 1e-8)


@law(
    "P12",
    seed=SEEDS,
    layers=st.sets(st.integers(0, 2), min_size=1),
    name=st.sampled_from(MLPS),
)
def test_p12_inner_products_add_up_over_layers(engine: str, seed: int, layers: set[int], name: str) -> None:
    """|g|^2 and <g_w, g_s> over a set of layers are sums over its members; a frozen layer takes its term away."""
    p = CASES[name].problem(seed=seed)
    linear = [module for module in p.model if isinstance(module, nn.Linear)]

    def products(chosen: set[int]) -> Tensor:
        encoder = [linear[i] for i in chosen]
        record = GradientConsistencyLoss(p.model, encoder=encoder, engine=engine).measure(*p.views)
        cross = record.cosine.nan_to_num(0.0) * record.norm_weak * record.norm_strong
        return torch.stack([record.norm_weak.square(), record.norm_strong.square(), cross])

    total = products(layers)
    within("sum over layers", compare.relative(total, sum(products({i}) for i in sorted(layers))), 1e-10)
    p.model.requires_grad_(False)
    for index in layers:
        linear[index].requires_grad_(True)
    frozen = GradientConsistencyLoss(p.model, engine=engine).measure(*p.views)
    within("the rest frozen", compare.relative(frozen.norm_weak.square(), total[0]), 1e-10)
