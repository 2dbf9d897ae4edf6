"""methods.FreeMatch against its paper's formulas, in plain loops over samples and classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradconsist import SSLBatch
from gradconsist.methods import FreeMatch
from support import compare
from support import methods as m

DATA = m.data(8)
C = m.CLASSES


class PseudoCode:
    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.tau, self.p, self.h = 1 / C, [1 / C] * C, [1 / C] * C

    def thresholds(self) -> list[float]:
        return [self.tau * p / max(self.p) for p in self.p]

    def step(self, weak, strong) -> tuple[list[int], list[float], float, float]:
        d, p, q = self.decay, m.softmaxes(weak), m.softmaxes(strong)
        labels = [int(row.argmax()) for row in p]
        self.tau = d * self.tau + (1 - d) * m.mean([max(row) for row in p])
        for c in range(C):
            self.p[c] = d * self.p[c] + (1 - d) * m.mean([row[c] for row in p])
            self.h[c] = d * self.h[c] + (1 - d) * labels.count(c) / len(labels)
        limits = self.thresholds()
        mask = [1.0 if row[label] >= limits[label] else 0.0 for row, label in zip(p, labels, strict=True)]
        unsupervised = m.mean([keep * loss for keep, loss in zip(mask, m.cross_entropy(strong, labels), strict=True)])
        return labels, mask, unsupervised, self.fairness([row for row, keep in zip(q, mask, strict=True) if keep])

    def fairness(self, masked) -> float:
        if not masked:
            return 0.0
        hard = [int(row.argmax()) for row in masked]
        a = [self.p[c] / self.h[c] if self.h[c] else 0.0 for c in range(C)]
        frequency = [hard.count(c) / len(hard) for c in range(C)]
        average = [m.mean([row[c] for row in masked]) for c in range(C)]
        b = [average[c] / frequency[c] if frequency[c] else 0.0 for c in range(C)]
        return sum(a[c] / sum(a) * math.log(b[c] / sum(b) + 1e-12) for c in range(C))


@pytest.mark.parametrize("decay", [0.999, 0.6])
def test_steps_against_the_pseudo_code(decay: float) -> None:
    model = m.network()
    method = FreeMatch(model, classes=C, ema_decay=decay, fairness_weight=0.2, unlabeled_weight=1.5).train()
    paper = PseudoCode(decay)
    rates = set()
    for batch in DATA:
        x, weak, strong = m.arrays(*m.outputs(model, batch.x, batch.weak, batch.strong))
        labels, mask, unsupervised, fairness = paper.step(weak, strong)
        out = method(batch)
        supervised = m.mean(m.cross_entropy(x, batch.y))
        assert float(out.loss.detach()) == pytest.approx(supervised + 1.5 * unsupervised + 0.2 * fairness, abs=1e-10)
        assert float(out.logs["loss_fairness"]) == pytest.approx(fairness, abs=1e-10)
        assert fairness < 0
        assert out.pair.target.tolist() == labels
        assert out.pair.weight.tolist() == mask
        assert float(method.confidence) == pytest.approx(paper.tau, abs=1e-12)
        assert method.probability.tolist() == pytest.approx(paper.p, abs=1e-12)
        assert method.histogram.tolist() == pytest.approx(paper.h, abs=1e-12)
        rates.add(sum(mask))
    assert len(rates) > 1 or decay == 0.999


def test_the_gradient_of_the_fairness_loss() -> None:
    """Histograms and averages are constants; only the mean of the strong probabilities is differentiated."""
    model, batch = m.network(), DATA[0]
    loss = {}
    for weight in (0.0, 1.0):
        out = FreeMatch(model, classes=C, ema_decay=0.6, fairness_weight=weight)(batch)
        loss[weight] = compare.gradient_of(out.loss, model)
    paper = PseudoCode(0.6)
    _, weak, strong = m.outputs(model, batch.x, batch.weak, batch.strong)
    _, mask, _, _ = paper.step(*m.arrays(weak, strong))
    twin = m.network()
    q = twin(torch.cat([batch.x, batch.weak, batch.strong]))[-9:].softmax(1)[torch.tensor(mask) > 0]
    counts = torch.bincount(q.argmax(1), minlength=C).double() / len(q)
    ratio = torch.where(counts > 0, q.mean(0) / counts.clamp(min=1e-9), 0)
    a = torch.tensor(paper.p, dtype=torch.float64) / torch.tensor(paper.h, dtype=torch.float64)
    expected = (a / a.sum() * (ratio / ratio.sum() + 1e-12).log()).sum()
    assert compare.relative(loss[1.0] - loss[0.0], compare.gradient_of(expected, twin)) <= 1e-8


def test_without_a_masked_sample_the_fairness_loss_is_zero_with_a_graph() -> None:
    method = FreeMatch(m.network(), classes=C, fairness_weight=1.0, threshold_range=(1.0, 1.0))
    out = method(DATA[0])
    assert out.pair.weight.sum() == 0
    assert float(out.logs["loss_fairness"]) == 0.0
    out.loss.backward()


def test_the_threshold_range_clamps() -> None:
    method = FreeMatch(m.network(), classes=C, threshold_range=(0.9, 0.95))
    method(DATA[0])
    assert method.thresholds().tolist() == [0.9] * C


def test_the_mask_counts_the_threshold_itself() -> None:
    """Uniform probabilities: max p = tau = 1/2 and both classes have T = 1/2."""
    model = nn.Linear(2, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    one = torch.ones(3, 2).double()
    out = FreeMatch(model, classes=2, fairness_weight=0.0)(SSLBatch(one, torch.tensor([0, 1, 0]), one, one))
    assert out.pair.weight.tolist() == [1.0] * 3
