"""methods.FlexMatch against algorithm 1 of its paper, in plain loops over samples and classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradconsist import SSLBatch
from gradconsist.methods import FlexMatch
from support import methods as m

DATA = m.data(8)


class PseudoCode:
    """The paper's bookkeeping: `selected` starts at -1 everywhere."""

    def __init__(self, samples: int, threshold: float, warmup: bool) -> None:
        self.selected = [-1] * samples
        self.threshold, self.warmup = threshold, warmup

    def thresholds(self) -> list[float]:
        sigma = [sum(1 for label in self.selected if label == c) for c in range(m.CLASSES)]
        unused = len(self.selected) - sum(sigma)
        largest = max(max(sigma), unused) if self.warmup else max(sigma)
        beta = [s / largest if largest else 0.0 for s in sigma]
        return [self.threshold * b / (2 - b) for b in beta]

    def step(self, x, y, weak, strong, index) -> tuple[float, list[int], list[float]]:
        thresholds = self.thresholds()
        supervised = m.mean(m.cross_entropy(x, y))
        unsupervised, labels, mask = 0.0, [], []
        for row_weak, row_strong in zip(weak, strong, strict=True):
            p = m.softmax(row_weak)
            label = int(p.argmax())
            labels.append(label)
            mask.append(1.0 if p[label] >= thresholds[label] else 0.0)
            unsupervised += mask[-1] * m.cross_entropy([row_strong], [label])[0] / len(weak)
        for i, row_weak, label in zip(index.tolist(), weak, labels, strict=True):
            if max(m.softmax(row_weak)) >= self.threshold:
                self.selected[i] = label
        return supervised + 1.5 * unsupervised, labels, mask


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_steps_against_the_pseudo_code(threshold: float, warmup: bool) -> None:
    model = m.network()
    method = FlexMatch(
        model, samples=m.SAMPLES, threshold=threshold, unlabeled_weight=1.5, threshold_warmup=warmup
    ).train()
    paper = PseudoCode(m.SAMPLES, threshold, warmup)
    rates = set()
    for batch in DATA:
        x, weak, strong = m.arrays(*m.outputs(model, batch.x, batch.weak, batch.strong))
        assert method.thresholds(m.CLASSES, torch.float64).tolist() == pytest.approx(paper.thresholds(), abs=1e-15)
        loss, labels, mask = paper.step(x, batch.y, weak, strong, batch.index)
        out = method(batch)
        assert float(out.loss.detach()) == pytest.approx(loss, abs=1e-10)
        assert out.pair.target.tolist() == labels
        assert out.pair.weight.tolist() == mask
        assert method.selected.tolist() == paper.selected
        rates.add(sum(mask))
    assert len(rates) > 1  # the thresholds did something


def test_everything_passes_at_the_start() -> None:
    out = FlexMatch(m.network(), samples=m.SAMPLES)(DATA[0])
    assert out.pair.weight.tolist() == [1.0] * 9
    assert float(out.logs["threshold_mean"]) == 0.0


def test_the_mask_counts_the_threshold_itself() -> None:
    """One class holds all of N, so T = threshold = 1/2; the logits give exactly one half."""
    model = nn.Linear(2, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    one = torch.ones(3, 2).double()
    method = FlexMatch(model, samples=3, threshold=0.5)
    method.selected.fill_(0)
    assert method.thresholds(2).tolist() == [0.5, 0.0]
    assert method(SSLBatch(one, torch.tensor([0, 1, 0]), one, one, torch.arange(3))).pair.weight.tolist() == [1.0] * 3


def test_a_repeated_sample_keeps_its_last_label() -> None:
    model = nn.Identity()
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [0.1, 0.0]])
    method = FlexMatch(model, samples=4, threshold=0.9)
    method(SSLBatch(logits[:1], torch.tensor([0]), logits, logits, torch.tensor([2, 2, 1, 1])))
    assert method.selected.tolist() == [-1, 0, 1, -1]  # the unsure second view of sample 1 changes nothing
