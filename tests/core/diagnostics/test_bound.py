"""Both sides of Proposition 1 against gradients by hand, and the inequality where it is and is not proved."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss
from gradconsist.diagnostics import BoundReport, consistency_bound
from gradconsist.errors import ConfigError, InputTypeError, InputValueError


def problem(noise: float = 0.1) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    weak = torch.randn(7, 4)
    return model, weak, weak + noise * torch.randn(7, 4), torch.randint(3, [7])


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Per-sample gradients in float64, [B, P]."""
    model = copy.deepcopy(model).double()
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


@pytest.mark.parametrize("segments", [1, 3])
def test_both_sides_by_hand(segments: int) -> None:
    model, weak, strong, y = problem()
    steps = [weak.double() + (strong.double() - weak.double()) * j / segments for j in range(segments + 1)]
    at = [gradients(model, x, y) for x in steps]
    distance = (strong.double() - weak.double()).norm(dim=1)
    lipschitz = torch.stack([(b - a).norm(dim=1) * segments / distance for a, b in itertools.pairwise(at)])
    lipschitz = lipschitz.amax(0)
    norm, cosine = at[0].norm(dim=1), F.cosine_similarity(at[0], at[-1], dim=1)
    report = consistency_bound(GradientConsistencyLoss(model), weak, strong, y, segments=segments)
    torch.testing.assert_close(report.lipschitz, lipschitz, rtol=1e-8, atol=0.0)
    assert abs(report.left - float(cosine.mean())) <= 1e-12
    assert abs(report.sigma - float(distance.square().mean().sqrt())) <= 1e-12
    assert abs(report.smoothness - float(lipschitz.max())) <= 1e-8 * float(lipschitz.max())
    right = (1 - (lipschitz.max() * distance / norm) ** 2).mean()
    assert abs(report.right - float(right)) <= 1e-8 * abs(float(right))
    by_pair = (1 - (lipschitz * distance / norm) ** 2).mean()
    assert abs(report.right_by_pair - float(by_pair)) <= 1e-8 * abs(float(by_pair))
    assert report.left_out == 0


@pytest.mark.parametrize(("distance", "segments"), [(1e-8, 1), (1e-6, 64), (0.0, 1)])
def test_views_whose_gradients_agree_up_to_rounding_are_refused(distance: float, segments: int) -> None:
    """1 - cos is rounding there: L was 2 to 450 times too large."""
    model, weak, strong, y = problem()
    match = "agree up to rounding, so no L can be computed.*fewer `segments`" if distance else "no pair is left"
    near = weak.double() + distance * (strong.double() - weak.double())
    with pytest.raises(InputValueError, match=match):
        consistency_bound(GradientConsistencyLoss(model.double()), weak.double(), near, y, segments=segments)


def test_entries_are_paired_by_key_and_constants_passed_on() -> None:
    class Named(nn.Module):
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor, scale: Tensor, dtype: torch.dtype, mask: None) -> Tensor:
            assert mask is None
            return self.layers((x * scale).to(dtype))

    model, weak, strong, y = problem()
    ones = torch.ones_like(weak)
    constants = {"dtype": torch.float32, "mask": None}  # the dtype follows the model into float64
    named = {"x": weak, "scale": ones, **constants}, {"mask": None, "scale": ones, "dtype": torch.float32, "x": strong}
    expected, found = (
        consistency_bound(GradientConsistencyLoss(model), weak, strong, y),
        consistency_bound(GradientConsistencyLoss(Named(model)), *named, y),
    )
    assert (found.left, found.right, found.sigma) == (expected.left, expected.right, expected.sigma)


def test_finer_segments_find_no_smaller_constant() -> None:
    model, weak, strong, y = problem(noise=2.0)
    coarse, fine = (consistency_bound(GradientConsistencyLoss(model), weak, strong, y, segments=n) for n in (1, 6))
    assert bool((fine.lipschitz >= coarse.lipschitz * (1 - 1e-9)).all())
    assert float(fine.lipschitz.max()) > float(coarse.lipschitz.max())


def bound_of(model: nn.Module, *arguments: Tensor) -> BoundReport:
    return consistency_bound(GradientConsistencyLoss(model), *arguments)


def test_near_views_satisfy_it_and_far_ones_make_it_vacuous() -> None:
    near = bound_of(*problem(noise=0.01))
    assert near.covered == near.covered_by_pair == 1.0
    assert near.holds
    assert not near.vacuous
    assert near.left >= near.right_by_pair >= near.right > 0.9
    far = bound_of(*problem(noise=20.0))
    assert far.vacuous
    assert "VACUOUS" in str(far)


def test_the_claim_fails_between_what_is_proved_and_what_is_trivial() -> None:
    """g_s = -0.1 g_w: GC = -1, and 1 - ||g_s - g_w||^2 / ||g_w||^2 = 1 - 1.1^2 = -0.21."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.w).sum(1)

    weak = torch.ones(3, 2)
    report = consistency_bound(
        GradientConsistencyLoss(Scale(), loss_fn=lambda z, t: z), weak, -0.1 * weak, torch.zeros(3)
    )
    assert abs(report.left + 1) <= 1e-12
    assert abs(report.right_by_pair + 0.21) <= 1e-6
    assert not report.holds
    assert report.covered_by_pair == 0.0
    assert "BELOW the bound" in str(report)


def test_pairs_without_a_cosine_are_left_out_and_the_model_stays() -> None:
    model, weak, strong, y = problem()
    before = copy.deepcopy(model.state_dict())
    strong[2] = weak[2]
    report = consistency_bound(GradientConsistencyLoss(model), weak, strong, y, torch.tensor([1.0, 0, 1, 1, 0.5, 1, 1]))
    assert report.left_out == 2
    assert len(report.cosine) == 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32


def test_batchnorm_keeps_its_statistics_on_the_segments() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    weak = torch.randn(7, 4)
    strong, y = weak + 0.01 * torch.randn(7, 4), torch.randint(3, [7])
    coarse, fine = (consistency_bound(GradientConsistencyLoss(model), weak, strong, y, segments=n) for n in (1, 4))
    # Close views: g is about linear between them, so finer parts see the same secant.
    torch.testing.assert_close(fine.lipschitz, coarse.lipschitz, rtol=0.05, atol=0.0)


def test_bad_arguments() -> None:
    model, weak, strong, y = problem()
    with pytest.raises(ConfigError, match="`segments` is 0"):
        consistency_bound(GradientConsistencyLoss(model), weak, strong, y, segments=0)
    with pytest.raises(ConfigError, match="`consistency` is of type Sequential: pass the GradientConsistencyLoss"):
        consistency_bound(model, weak, strong, y)  # type: ignore[arg-type]
    with pytest.raises(InputValueError, match="no pair is left"):
        consistency_bound(GradientConsistencyLoss(model), weak, weak, y)
    table = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3))
    tokens = torch.randint(5, [7, 2])
    with pytest.raises(InputTypeError, match="has no floating tensor"):
        consistency_bound(GradientConsistencyLoss(table), tokens, tokens, y)
    with pytest.raises(InputTypeError, match="differ in an integer tensor"):
        consistency_bound(GradientConsistencyLoss(table), tokens, 4 - tokens, y)
