"""The judge is judged first: by a closed form, and by finite differences of the whole loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.oracle import Judge, judge
from support.zoo import CASES


def _linear(bias: bool) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    model = nn.Linear(5, 4, bias=bias).double()
    weak, strong = torch.randn(6, 5).double(), torch.randn(6, 5).double()
    return model, weak, strong, torch.randint(4, (6,))


@pytest.mark.parametrize("bias", [False, True])
def test_closed_form_of_a_linear_softmax(bias: bool) -> None:
    """The gradient is (p - y) x^T, so cos = cos of residuals times cos of inputs (with a bias, of (x, 1))."""
    model, weak, strong, target = _linear(bias)
    with torch.no_grad():
        residuals = [torch.softmax(model(x), 1) - F.one_hot(target, 4).double() for x in (weak, strong)]
    inputs = [F.pad(x, (0, 1), value=1.0) if bias else x for x in (weak, strong)]
    expected = F.cosine_similarity(*residuals, dim=1) * F.cosine_similarity(*inputs, dim=1)
    verdict = judge(model, weak, strong, target)
    torch.testing.assert_close(verdict.cosine, expected, rtol=0.0, atol=1e-13)
    torch.testing.assert_close(
        verdict.norm_weak, residuals[0].norm(dim=1) * inputs[0].norm(dim=1), rtol=1e-13, atol=0.0
    )
    torch.testing.assert_close(verdict.loss, (1 - expected).mean(), rtol=1e-13, atol=0.0)


def test_closed_form_of_the_gradient() -> None:
    """The same closed form, differentiated by autograd: only cos of residuals depends on the weights."""
    model, weak, strong, target = _linear(True)
    residuals = [torch.softmax(model(x), 1) - F.one_hot(target, 4).double() for x in (weak, strong)]
    inputs = [F.pad(x, (0, 1), value=1.0) for x in (weak, strong)]
    loss = (1 - F.cosine_similarity(*residuals, dim=1) * F.cosine_similarity(*inputs, dim=1)).mean()
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(judge(model, weak, strong, target).flat, expected, rtol=1e-11, atol=1e-13)


def _direction(oracle: Judge, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in oracle.trainable.items()}
    for name, module in oracle.model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            direction[f"{name}.weight"][module.padding_idx] = 0.0  # a row that autograd holds constant by definition
    return direction


# What these remember follows the weights or the inputs without a derivative, on purpose.
_HELD = {"spectral_norm_train", "moving_codebook"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in _HELD])
def test_finite_differences_of_the_whole_loss(name: str) -> None:
    oracle, verdict = CASES[name].problem().judge(), CASES[name].verdict()
    for seed in range(2):
        direction = _direction(oracle, seed)
        analytic = sum(float((verdict.gradient[n] * v).sum()) for n, v in direction.items())
        scale = float(verdict.flat.norm()) * sum(float(v.square().sum()) for v in direction.values()) ** 0.5
        assert abs(oracle.slope(direction, step=1e-6) - analytic) <= 1e-7 * scale


@pytest.mark.parametrize("name", CASES)
def test_a_zoo_model_is_a_fair_test(name: str) -> None:
    """Gradients well above the floor, cosines that differ, a gradient worth comparing, statistics that matter."""
    verdict = CASES[name].verdict()
    assert not verdict.degenerate.any()
    assert float(torch.minimum(verdict.norm_weak, verdict.norm_strong).min()) > 1e-3
    assert float(verdict.cosine.max() - verdict.cosine.min()) > 1e-4
    assert float(verdict.flat.norm()) > 1e-3


def test_weight_norm_is_wrong_in_torch_and_right_by_hand() -> None:
    """Why the oracle rewrites it.  If torch mends its second derivative, this says so and the rewrite may go."""
    case = CASES["weight_norm"]
    by_autograd, by_hand = case.problem().judge(reference=None).verdict(), case.problem().judge().verdict()
    torch.testing.assert_close(by_autograd.cosine, by_hand.cosine, rtol=0.0, atol=1e-12)
    assert float((by_autograd.flat - by_hand.flat).norm() / by_hand.flat.norm()) > 1e-3


def test_stop_gradient_options_add_up() -> None:
    """d cos = (through the weak view) + (through the strong view): each option removes one of the two."""
    problem = CASES["mlp"].problem()
    both = problem.judge().verdict().flat
    parts = [problem.judge(stop_gradient=view).verdict().flat for view in ("weak", "strong")]
    torch.testing.assert_close(parts[0] + parts[1], both, rtol=1e-11, atol=1e-13)
    assert float(parts[0].norm()) > 1e-3
    assert float(parts[1].norm()) > 1e-3
