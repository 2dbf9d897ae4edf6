"""methods.PseudoLabel against its paper's loss, in plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gradconsist.methods import PseudoLabel
from support import compare
from support import methods as m

DATA = m.data(5)


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_steps_against_the_formula(threshold: float) -> None:
    model = m.network()
    method = PseudoLabel(model, threshold=threshold, unlabeled_weight=1.5, unlabeled_ramp_steps=3).train()
    for step, batch in enumerate(DATA):
        x, weak = m.arrays(*m.outputs(model, batch.x, batch.weak))  # strong views are not forwarded
        p = m.softmaxes(weak)
        labels = [int(row.argmax()) for row in p]
        mask = [1.0 if max(row) >= threshold else 0.0 for row in p]
        losses = m.cross_entropy(weak, labels)
        unsupervised = m.mean([keep * loss for keep, loss in zip(mask, losses, strict=True)])
        out = method(batch)
        expected = m.mean(m.cross_entropy(x, batch.y)) + 1.5 * min(1, step / 3) * unsupervised
        assert float(out.loss.detach()) == pytest.approx(expected, abs=1e-10)
        assert out.pair.target.tolist() == labels
        assert out.pair.weight.tolist() == mask
        assert out.pair.strong is batch.strong


def test_the_gradient_goes_through_the_same_logits() -> None:
    model, batch = m.network(), DATA[0]
    out = PseudoLabel(model, threshold=0.6)(batch)
    found = compare.gradient_of(out.loss, model)
    twin = m.network()
    x, weak = twin(torch.cat([batch.x, batch.weak])).split([4, 9])
    loss = (
        F.cross_entropy(x, batch.y)
        + (out.pair.weight * F.cross_entropy(weak, out.pair.target, reduction="none")).mean()
    )
    assert 0 < float(out.pair.weight.sum()) < 9
    assert compare.relative(found, compare.gradient_of(loss, twin)) <= 1e-10
