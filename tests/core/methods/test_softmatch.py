"""methods.SoftMatch against its paper's formulas, in plain loops over samples and classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradconsist import SSLBatch
from gradconsist.methods import SoftMatch
from support import methods as m

DATA = m.data(8)
C = m.CLASSES


class PseudoCode:
    def __init__(self, decay: float, width: float, align: bool) -> None:
        self.decay, self.width, self.align = decay, width, align
        self.p, self.mean, self.variance = None, 1 / C, 1.0

    def weights(self, weak) -> list[float]:
        d, p = self.decay, m.softmaxes(weak)
        average = [m.mean([row[c] for row in p]) for c in range(C)]
        self.p = average if self.p is None else [d * a + (1 - d) * b for a, b in zip(self.p, average, strict=True)]
        confidences = []
        for row in p:
            aligned = [row[c] * (1 / C + 1e-6) / (self.p[c] + 1e-6) for c in range(C)] if self.align else row
            confidences.append(max(aligned) / sum(aligned))
        centre = m.mean(confidences)
        spread = sum((value - centre) ** 2 for value in confidences) / (len(confidences) - 1)
        self.mean = d * self.mean + (1 - d) * centre
        self.variance = d * self.variance + (1 - d) * spread
        return [
            math.exp(-(min(0.0, value - self.mean) ** 2) / (2 * self.variance / self.width**2)) for value in confidences
        ]


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize(("decay", "width"), [(0.999, 2.0), (0.5, 3.0)])
def test_steps_against_the_pseudo_code(decay: float, width: float, align: bool) -> None:
    model = m.network()
    method = SoftMatch(model, classes=C, ema_decay=decay, width=width, align=align, unlabeled_weight=1.5).train()
    paper = PseudoCode(decay, width, align)
    for batch in DATA:
        x, weak, strong = m.arrays(*m.outputs(model, batch.x, batch.weak, batch.strong))
        weights = paper.weights(weak)
        labels = [int(row.argmax()) for row in weak]  # of the unaligned logits
        losses = m.cross_entropy(strong, labels)
        unsupervised = m.mean([w * loss for w, loss in zip(weights, losses, strict=True)])
        out = method(batch)
        supervised = m.mean(m.cross_entropy(x, batch.y))
        assert float(out.loss.detach()) == pytest.approx(supervised + 1.5 * unsupervised, abs=1e-10)
        assert out.pair.target.tolist() == labels
        assert out.pair.weight.tolist() == pytest.approx(weights, abs=1e-12)
        assert method.probability.tolist() == pytest.approx(paper.p, abs=1e-12)
        assert float(method.mean) == pytest.approx(paper.mean, abs=1e-12)
        assert float(method.variance) == pytest.approx(paper.variance, abs=1e-12)
    if decay < 0.9:
        assert len({round(w, 6) for w in weights}) > 3  # soft, and not all 1


def test_the_alignment_moves_no_label() -> None:
    """All samples prefer class 0; aligned, some prefer class 1, and their label stays 0."""
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.2, 0.0]]).double()
    method = SoftMatch(nn.Identity(), classes=2)
    out = method(SSLBatch(logits[:1], torch.tensor([0]), logits, logits))
    assert method._aligned(logits.softmax(1)).argmax(1).tolist() == [0, 0, 0, 1]
    assert out.pair.target.tolist() == [0, 0, 0, 0]


def test_one_sample_leaves_the_variance_and_zero_variance_makes_a_mask() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.2, 0.0]])
    method = SoftMatch(nn.Identity(), classes=2, align=False)
    method(SSLBatch(logits[:1], torch.tensor([0]), logits[:1], logits[:1]))
    assert float(method.variance) == 1.0
    method.variance.zero_()
    method.mean.fill_(float(logits.softmax(1)[0, 0]))
    assert method.eval()(SSLBatch(logits[:1], torch.tensor([0]), logits, logits)).pair.weight.tolist() == [1.0, 0.0]
