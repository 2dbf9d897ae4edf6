"""methods.MixMatch against algorithm 1 of its paper, in plain loops over rows and classes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss, SSLBatch
from gradconsist.errors import InputTypeError, StateError
from gradconsist.methods import MixMatch
from support import methods as m
from support import training

DATA = m.data(4, labeled=5, unlabeled=7)
C, T = m.CLASSES, 0.5


def draws(method: MixMatch, rows: int) -> tuple[list[int], list[float]]:
    """The order and the shares of the coming step, from the method's stored generator."""
    generator = torch.Generator()
    generator.set_state(method.state_dict()["_extra_state"]["generator"])
    order = torch.randperm(rows, generator=generator).tolist()
    one, two = torch._standard_gamma(
        torch.full((2, rows), method.alpha, dtype=torch.float64), generator=generator
    ).tolist()
    return order, [max(a / (a + b), 1 - a / (a + b)) for a, b in zip(one, two, strict=True)]


def guesses(model: nn.Module, batch: SSLBatch) -> list[list[float]]:
    """The sharpened mean of both views' probabilities; each view is a batch of its own."""
    one, two = (m.softmaxes(m.arrays(*m.outputs(model, view))[0]) for view in (batch.weak, batch.strong))
    found = []
    for p, q in zip(one, two, strict=True):
        powers = [((p[c] + q[c]) / 2) ** (1 / T) for c in range(C)]
        found.append([power / sum(powers) for power in powers])
    return found


def mixed(batch: SSLBatch, guess: list[list[float]], order: list[int], shares: list[float]) -> tuple[Tensor, list]:
    rows = [*batch.x.tolist(), *batch.weak.tolist(), *batch.strong.tolist()]
    targets = [[1.0 if c == label else 0.0 for c in range(C)] for label in batch.y.tolist()] + guess + guess

    def mix(values: list) -> list:
        return [
            [share * a + (1 - share) * b for a, b in zip(values[i], values[order[i]], strict=True)]
            for i, share in enumerate(shares)
        ]

    return torch.tensor(mix(rows), dtype=torch.float64), mix(targets)


def loss(logits: np.ndarray, targets: list, n: int, weight: float) -> float:
    p = m.softmaxes(logits)
    supervised = m.mean([-sum(targets[i][c] * math.log(p[i][c]) for c in range(C)) for i in range(n)])
    unsupervised = m.mean([(p[i][c] - targets[i][c]) ** 2 for i in range(n, len(p)) for c in range(C)])
    return supervised + weight * unsupervised


@pytest.mark.parametrize("joint", [True, False])
def test_steps_against_the_pseudo_code(joint: bool) -> None:
    model = m.network()
    method = MixMatch(model, unlabeled_weight=30.0, unlabeled_ramp_steps=3, alpha=0.6, joint=joint).train()
    for step, batch in enumerate(DATA):
        order, shares = draws(method, 19)
        assert all(0.5 <= share <= 1 for share in shares)
        guess = guesses(model, batch)
        inputs, targets = mixed(batch, guess, order, shares)
        if joint:
            (logits,) = m.arrays(*m.outputs(model, inputs))
        else:  # every third row of each source, three batches
            logits = np.zeros((19, C))
            for k in range(3):
                chosen = [*range(k, 5, 3), *range(5 + k, 12, 3), *range(12 + k, 19, 3)]
                (logits[chosen],) = m.arrays(*m.outputs(model, inputs[chosen]))
        out = method(batch)
        assert float(out.logs["unlabeled_weight"]) == pytest.approx(30 * min(1, step / 3))
        assert float(out.loss.detach()) == pytest.approx(loss(logits, targets, 5, 30 * min(1, step / 3)), abs=1e-9)
        assert out.pair.weak is batch.weak  # before mixing
        assert out.pair.strong is batch.strong
        assert out.pair.target.tolist() == [pytest.approx(row, abs=1e-12) for row in guess]
        assert out.pair.weight.tolist() == [1.0] * 7


@pytest.mark.parametrize("joint", [True, False])
def test_what_enters_the_running_statistics(joint: bool) -> None:
    """Guessing leaves no trace, and of the three interleaved batches only the first one does."""
    model, batch = m.network(), DATA[0]
    method = MixMatch(model, joint=joint)
    order, shares = draws(method, 19)
    inputs, _ = mixed(batch, guesses(model, batch), order, shares)
    chosen = range(19) if joint else [*range(0, 5, 3), *range(5, 12, 3), *range(12, 19, 3)]
    twin = copy.deepcopy(model)
    twin(inputs[list(chosen)])
    method(batch)
    assert int(model[1].num_batches_tracked) == 1
    assert torch.allclose(model[1].running_mean, twin[1].running_mean, atol=1e-14)
    assert torch.allclose(model[1].running_var, twin[1].running_var, atol=1e-14)
    assert model[1].track_running_stats


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_close_views_have_gradients_that_agree_without_sharpening(temperature: float) -> None:
    """Against the mean of both predictions their residuals are opposite: the term would drive close views apart."""
    model, batch = m.network(), DATA[0]
    batch = batch._replace(strong=batch.weak + 1e-3 * torch.randn_like(batch.weak))
    pair = MixMatch(model, temperature=temperature)(batch).pair
    (one,), (two,) = (m.arrays(*m.outputs(model, view)) for view in (batch.weak, batch.strong))
    assert pair.target.tolist() == (m.softmaxes(one) + m.softmaxes(two)).argmax(1).tolist()
    record = GradientConsistencyLoss(model).measure(pair.weak, pair.strong, pair.target)
    assert float(record.cosine.min()) > 0.99


def test_number_of_forwards() -> None:
    for joint, calls in ((True, 3), (False, 5)):
        model = m.network()
        count = training.Counter(model)
        MixMatch(model, joint=joint)(DATA[0])
        assert count.calls == calls


def test_one_labeled_and_one_unlabeled_input() -> None:
    """Fewer rows than batches: those without rows are left out."""
    model = nn.Linear(5, 3).double()
    x, y, weak, strong, _ = DATA[0]
    out = MixMatch(model, unlabeled_ramp_steps=0)(SSLBatch(x[:1], y[:1], weak[:1], strong[:1]))
    out.loss.backward()
    assert model.weight.grad is not None


def test_the_shares_have_their_distribution() -> None:
    """max(b, 1 - b) of Beta(alpha, alpha): mean and variance of b are 1/2 and 1 / (4 (2 alpha + 1))."""
    method = MixMatch(nn.Identity(), alpha=0.75)
    ones, zeros = torch.ones(40_000, 1).double(), torch.zeros(40_000, 1).double()
    share, _ = method._mixed(torch.cat([ones, zeros]), torch.cat([ones, zeros]))
    # rows of ones that met a zero: their value is the share itself
    met = share[:40_000][share[:40_000] < 1]
    assert float(met.min()) >= 0.5
    assert len(met) == pytest.approx(20_000, rel=0.03)
    assert float((met - 0.5).square().mean()) == pytest.approx(1 / (4 * (2 * 0.75 + 1)), rel=0.02)


def test_alpha_0_mixes_nothing() -> None:
    model, batch = m.network(), DATA[0]
    method = MixMatch(model, alpha=0.0, joint=True, unlabeled_ramp_steps=0, unlabeled_weight=0.0)
    logits = m.arrays(*m.outputs(model, batch.x, batch.weak, batch.strong))[0]
    assert float(method(batch).loss.detach()) == pytest.approx(m.mean(m.cross_entropy(logits, batch.y)), abs=1e-12)


def test_it_draws_from_its_own_generator() -> None:
    before = torch.get_rng_state()
    method = MixMatch(m.network())
    states = [method(batch) and method.state_dict()["_extra_state"]["generator"] for batch in DATA[:2]]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(*states)
    copy.deepcopy(method)


def test_integer_inputs_are_refused() -> None:
    with pytest.raises(InputTypeError, match=r"holds inputs of torch\.int64: MixUp mixes one floating-point tensor"):
        MixMatch(m.network())(DATA[0]._replace(x=DATA[0].x.long()))


def test_inputs_of_several_tensors_are_refused() -> None:
    x, weak, strong = ({"a": part, "b": part} for part in (DATA[0].x, DATA[0].weak, DATA[0].strong))
    batch = DATA[0]._replace(x=x, weak=weak, strong=strong)
    with pytest.raises(InputTypeError, match=r"holds inputs of torch\.float64, torch\.float64: MixUp mixes one"):
        MixMatch(m.network())(batch)


def test_a_state_without_generator_is_refused() -> None:
    with pytest.raises(StateError, match="no generator"):
        MixMatch(m.network()).set_extra_state({"step": 3})
