"""N1 to N5 of the test plan: gradients that are zero, tiny, huge or of mixed scale, and logits that saturate.

`Product` makes any vector the per-sample gradient, so that GC and its derivative have a closed form.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss
from gradconsist._consistency.similarity import cosine, degenerate_pairs
from gradconsist.errors import ConfigError, NonFiniteError
from gradconsist.types import GradProducts
from support import compare
from support.zoo import CASES

ENGINES = pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZE = 40


class Product(nn.Module):
    """x * p^2 at p = 1: the gradient of the sum is 2x, its derivative diag(2x), neither of which rounds."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.p.square()


def total(output: Tensor, target: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32)).sum(1)


def closed_form(weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor]:
    """GC [B] and dGC/dp [B, P] at p = 1, in float64, norms taken after scaling by the largest entry."""
    units = []
    for vectors in (weak.double(), strong.double()):
        scaled = vectors / vectors.abs().amax(1, keepdim=True)
        units.append(scaled / scaled.norm(dim=1, keepdim=True))
    a, b = units
    c = (a * b).sum(1, keepdim=True)
    return c.squeeze(1), a * (b - c * a) + b * (a - c * b)


def vectors(scale: float, dtype: torch.dtype, *, mixed: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two views of three pairs; entries over `mixed` powers of ten."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(3, SIZE, generator=generator).double()  # noqa: E731
    spread = 10 ** (mixed * torch.rand(3, SIZE, generator=generator).double())
    weak = draw()
    return (weak * spread * scale).to(dtype), ((weak + draw()) * spread * scale).to(dtype)


def compared(weak: Tensor, strong: Tensor, **options: Any) -> tuple[Any, float, Tensor]:
    """Record, value and gradient where the views are the per-sample gradients."""
    model = Product(weak.shape[1], weak.dtype)
    gc = GradientConsistencyLoss(model, loss_fn=total, **options)
    loss = gc(weak, strong, torch.zeros(len(weak), dtype=torch.long))
    return gc.last, float(loss.detach()), compare.gradient_of(loss, model)


# Scale, and powers of ten over which entries spread. Float16 holds 6e-8 to 65504, and the loss is multiplied by 1024.
NORMAL = {
    torch.float64: [(1.0, 0), (1e-9, 0), (1e15, 0), (1e30, 0), (1e-9, 12), (1e100, 40)],
    torch.float32: [(1.0, 0), (1e-9, 0), (1e15, 0), (1e-9, 6), (1e10, 6)],
    torch.bfloat16: [(1.0, 0), (1e-9, 0), (1e15, 0), (1e-9, 6), (1e10, 6)],
    torch.float16: [(1.0, 0), (1e-6, 0), (1e-4, 3)],
}
WITHIN = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@FUSED
@ENGINES
@pytest.mark.parametrize(("dtype", "scale", "mixed"), [(d, *row) for d, rows in NORMAL.items() for row in rows])
def test_n01_every_scale_is_exact(dtype: torch.dtype, scale: float, mixed: float, engine: str, fused: bool) -> None:
    """Value and derivative against the closed form; p = 1, so that the gradients themselves do not round."""
    weak, strong = vectors(scale, dtype, mixed=mixed)
    record, _, gradient = compared(weak, strong, engine=engine, fused=fused, min_norm=1e-9)
    value, derivative = closed_form(weak, strong)
    assert not record.degenerate.any()
    assert compare.cosine_error(record.cosine, value) <= min(WITHIN[dtype], 1e-6)  # summed in float32
    assert compare.relative(gradient, -derivative.mean(0)) <= WITHIN[dtype]


@FUSED
@ENGINES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_n01_zero_and_tiny_are_degenerate(scale: float, dtype: torch.dtype, engine: str, fused: bool) -> None:
    """In each view, and beside ordinary pairs, whose value and derivative stay exact."""
    weak, strong = vectors(1.0, dtype)
    weak[0] = weak[0].double() * scale
    strong[1] = strong[1].double() * scale
    record, loss, gradient = compared(weak, strong, engine=engine, fused=fused)
    assert record.degenerate.tolist() == [True, True, False]
    value, derivative = closed_form(weak[2:], strong[2:])
    assert abs(loss - float(1 - value[0]) / 3) <= 1e-6
    assert compare.relative(gradient, -derivative[0] / 3) <= WITHIN[dtype]


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_n01_a_norm_whose_square_overflows_is_refused(dtype: torch.dtype, engine: str) -> None:
    weak, strong = vectors(1e30, dtype)
    gc = GradientConsistencyLoss(Product(SIZE, dtype), loss_fn=total, engine=engine)
    with pytest.raises(NonFiniteError, match="squared norm overflowed"):
        gc(weak, strong, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("min_norm", [1e-18, 1e-8, 1e-3])
def test_n01_the_derivative_is_bounded_by_one_over_min_norm(min_norm: float, dtype: torch.dtype) -> None:
    """|dGC/dg| <= 1/|g| <= 1/min_norm down to the bound, and 0 below it: never NaN, never infinite."""
    generator = torch.Generator().manual_seed(1)
    factor = torch.cat([torch.logspace(-6, 6, 49, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    unit = torch.randn(2, len(factor), 7, generator=generator, dtype=torch.float64)
    unit = unit / unit.norm(dim=2, keepdim=True)
    weak = (unit[0] * factor[:, None] * min_norm).to(dtype).requires_grad_()
    strong = unit[1].to(dtype).requires_grad_()
    products = GradProducts((weak * weak).sum(1), (strong * strong).sum(1), (weak * strong).sum(1))
    degenerate = degenerate_pairs(products, min_norm)
    value = cosine(products, degenerate)
    by_weak, by_strong = torch.autograd.grad(value.sum(), [weak, strong])
    for derivative in (by_weak, by_strong):
        assert torch.isfinite(derivative).all()
        assert not derivative[degenerate].any()
    assert degenerate.tolist() == (weak.detach().double().norm(dim=1) <= min_norm).tolist() or min_norm < 1e-15
    slack = 1 + 1e-5
    assert float(by_weak.double().norm(dim=1).max()) <= slack / min_norm
    assert (by_weak.double().norm(dim=1) <= slack / weak.detach().double().norm(dim=1)).all()
    assert torch.isfinite(value).all()
    expected = (unit[0] * unit[1]).sum(1)
    far = ~degenerate
    torch.testing.assert_close(
        value.double()[far], expected[far], rtol=0.0, atol=1e-5 if dtype == torch.float32 else 1e-12
    )


@ENGINES
def test_n02_a_vector_with_itself_in_float16(engine: str) -> None:
    """randn(512): squared norms of 512, whose product is beyond float16 (F.cosine_similarity once gave 0 there)."""
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    gc = GradientConsistencyLoss(Product(512, torch.float16), loss_fn=total, engine=engine)
    record = gc.measure(x.half(), x.half(), torch.tensor([0]))
    torch.testing.assert_close(record.cosine, torch.ones(1), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(record.norm_weak.double(), 2 * x.half().double().norm(dim=1), rtol=1e-6, atol=0.0)
    model = nn.Linear(512, 3)
    linear = GradientConsistencyLoss(model, engine=engine)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear(x, x, torch.tensor([1]))
    torch.testing.assert_close(linear.last.cosine, torch.ones(1), rtol=0.0, atol=1e-6)
    assert abs(float(loss.detach())) <= 1e-6
    assert float(compare.gradient_of(loss, model).norm()) <= 1e-3


@FUSED
@ENGINES
def test_n03_zero_views_and_one_hot_vectors(engine: str, fused: bool) -> None:
    """One view zero, both zero, one-hot: the same axis, another one, and the opposite."""
    eye = torch.eye(SIZE, dtype=torch.float64)
    weak = torch.stack([0 * eye[0], 0 * eye[0], eye[0], eye[0], eye[0], eye[0] + eye[1]])
    strong = torch.stack([eye[0], 0 * eye[0], eye[0], eye[1], -eye[0], eye[0]])
    record, _, gradient = compared(weak, strong, engine=engine, fused=fused)
    assert record.degenerate.tolist() == [True, True, False, False, False, False]
    expected = torch.tensor([torch.nan, torch.nan, 1, 0, -1, 0.5**0.5], dtype=torch.float64)
    assert compare.cosine_error(record.cosine, expected) <= 1e-15
    _, derivative = closed_form(weak[2:], strong[2:])
    assert compare.relative(gradient, -derivative.sum(0) / 6) <= 1e-14


@FUSED
@ENGINES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_n03_one_parameter(dtype: torch.dtype, engine: str, fused: bool) -> None:
    """Numbers have a sign and no direction: cosine 1 or -1, whose derivative is 0."""
    weak, strong = torch.tensor([[2.0], [3.0], [0.0]], dtype=dtype), torch.tensor([[5.0], [-0.1], [1.0]], dtype=dtype)
    record, _, gradient = compared(weak, strong, engine=engine, fused=fused)
    eps = torch.finfo(dtype).eps
    assert record.degenerate.tolist() == [False, False, True]
    assert float((record.cosine[:2] - torch.tensor([1.0, -1.0])).abs().max()) <= 2 * eps
    assert float(gradient.abs().max()) <= 4 * eps


@pytest.mark.parametrize("min_norm", [0.0, 1e-19, 1e-30, 5e-324, float("inf"), float("nan")])
def test_n04_a_floor_whose_square_is_no_normal_float32(min_norm: float) -> None:
    with pytest.raises(ConfigError, match="`min_norm`"):
        GradientConsistencyLoss(nn.Linear(2, 2), min_norm=min_norm)


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_n04_the_smallest_floor_still_catches_zero(dtype: torch.dtype, engine: str) -> None:
    """1e-18 is 0 in float16: the comparison with it is made in float32."""
    weak, strong = vectors(1.0, dtype)
    weak[1] = 0
    gc = GradientConsistencyLoss(Product(SIZE, dtype), loss_fn=total, engine=engine, min_norm=1e-18)
    gc(weak, strong, torch.zeros(3, dtype=torch.long))
    assert gc.last.degenerate.tolist() == [False, True, False]


@ENGINES
@pytest.mark.parametrize(
    ("autocast", "fused"), [(None, True), (None, False), (torch.bfloat16, True), (torch.float16, True)]
)
def test_n05_saturation_is_monotone(autocast: torch.dtype | None, fused: bool, engine: str) -> None:
    """Margins from 5 to 120: the degenerate pairs only become more, up to all, and nothing is ever NaN."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(12, 6, generator=generator)
    model = nn.Linear(6, 3)
    direction = nn.functional.normalize(torch.randn(3, 6, generator=generator), dim=1)
    target = (x @ direction.T).argmax(1)
    top = (x @ direction.T).topk(2, dim=1).values
    sharpest = float((top[:, 0] - top[:, 1]).median())
    gc = GradientConsistencyLoss(model, engine=engine, fused=fused)
    counts = []
    for margin in (5, 10, 15, 20, 30, 60, 120, 1e3, 1e5):
        with torch.no_grad():
            model.weight.copy_(direction * margin / sharpest)
            model.bias.zero_()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = gc(x, x + 0.01 * torch.ones(6), target)
        gradient = compare.gradient_of(loss, model)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
        assert not gc.last.cosine[~gc.last.degenerate].isnan().any()
        counts.append(int(gc.last.degenerate.sum()))
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 12


def test_n05_the_float64_count_is_that_of_the_oracle() -> None:
    """A pair is degenerate because its gradient is small, and not because float64 ran out of digits."""
    p = CASES["mlp"].problem()
    with torch.no_grad():
        p.model[4].weight.mul_(12)
        p.target[:] = p.model(p.weak).argmax(1)
    gc = GradientConsistencyLoss(p.model)
    gc(*p.views)
    assert gc.last.degenerate.tolist() == p.judge().verdict().degenerate.tolist()
