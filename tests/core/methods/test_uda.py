"""methods.UDA against its paper's formulas, in plain loops over samples and classes."""

from __future__ import annotations

import math

import pytest
import torch

from gradconsist.methods import UDA
from support import compare
from support import methods as m

DATA = m.data(7)
C = m.CLASSES
SIGNALS = {
    "linear": lambda t: t,
    "log": lambda t: 1 - math.exp(-t * 5),
    "exp": lambda t: math.exp((t - 1) * 5),
}


def unsupervised(weak, strong, threshold: float, temperature: float) -> tuple[float, list[list[float]], list[float]]:
    losses, targets, mask = [], [], []
    for row_weak, row_strong in zip(weak, strong, strict=True):
        p, q = m.softmax(row_weak), m.softmax(row_strong)
        powers = [value ** (1 / temperature) for value in p]
        t = [power / sum(powers) for power in powers]
        targets.append(t)
        mask.append(1.0 if max(p) >= threshold else 0.0)  # of p before it is sharpened
        losses.append(mask[-1] * sum(t[c] * (math.log(t[c]) - math.log(q[c])) for c in range(C)))
    return m.mean(losses), targets, mask


@pytest.mark.parametrize(("threshold", "temperature"), [(0.45, 0.4), (0.0, 1.0), (0.8, 0.9)])
def test_steps_against_the_formulas(threshold: float, temperature: float) -> None:
    model = m.network()
    method = UDA(model, threshold=threshold, temperature=temperature, unlabeled_weight=1.5)
    for batch in DATA[:3]:
        x, weak, strong = m.arrays(*m.outputs(model, batch.x, batch.weak, batch.strong))
        loss, targets, mask = unsupervised(weak, strong, threshold, temperature)
        out = method(batch)
        expected = m.mean(m.cross_entropy(x, batch.y)) + 1.5 * loss
        assert float(out.loss.detach()) == pytest.approx(expected, abs=1e-10)
        assert out.pair.target.tolist() == [pytest.approx(t, abs=1e-12) for t in targets]
        assert out.pair.weight.tolist() == mask


@pytest.mark.parametrize("annealing", SIGNALS)
def test_training_signal_annealing(annealing: str) -> None:
    """Labeled samples whose probability is above the rising limit are left out; L_s is the mean of the others."""
    model = m.network()
    method = UDA(model, unlabeled_weight=0.0, annealing=annealing, annealing_steps=5)
    kept = []
    for step, batch in enumerate(DATA):
        (x, *_) = m.arrays(*m.outputs(model, batch.x, batch.weak, batch.strong))
        limit = SIGNALS[annealing](step / 5) * (1 - 1 / C) + 1 / C
        losses = [
            loss
            for loss, row, label in zip(m.cross_entropy(x, batch.y), x, batch.y, strict=True)
            if m.softmax(row)[int(label)] <= limit or step >= 5
        ]
        kept.append(len(losses))
        out = method(batch)
        assert float(out.loss.detach()) == pytest.approx(sum(losses) / max(1, len(losses)), abs=1e-10)
        assert float(out.logs["labeled_rate"]) == pytest.approx(len(losses) / 4)
    assert min(kept) < 4
    assert kept[5:] == [4, 4]


def test_the_target_is_a_constant() -> None:
    model, batch = m.network(), DATA[0]
    _, weak, strong = m.outputs(model, batch.x, batch.weak, batch.strong)
    _, targets, mask = unsupervised(*m.arrays(weak, strong), 0.45, 0.4)
    twin = m.network()
    x, _, q = twin(torch.cat([batch.x, batch.weak, batch.strong])).split([4, 9, 9])
    divergence = -(torch.tensor(targets) * q.log_softmax(1)).sum(1)
    loss = torch.nn.functional.cross_entropy(x, batch.y) + (torch.tensor(mask) * divergence).mean()
    found = compare.gradient_of(UDA(model, threshold=0.45)(batch).loss, model)
    assert compare.relative(found, compare.gradient_of(loss, twin)) <= 1e-10
