"""methods.FixMatch against the paper's pseudo-code, in plain Python loops over samples and classes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from gradconsist import SSLBatch, StepOutput
from gradconsist.methods import FixMatch
from support import compare, training

DATA = [
    SSLBatch(*(v.double() if v.is_floating_point() else v for v in batch)) for batch in training.batches(8, unlabeled=9)
]


def network() -> nn.Module:
    return training.network(dropout=0.0).double()


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return [p / sum(powers) for p in powers]


def pseudo_code(
    x: Tensor, y: Tensor, weak: Tensor, strong: Tensor, threshold: float, mu: float, brier: float = 0.0
) -> tuple[float, float, list[int], list[float]]:
    """Algorithm 1 of the FixMatch paper on logits: l_s, l_u, pseudo-labels, mask."""
    supervised = 0.0
    for row, label in zip(x.tolist(), y.tolist(), strict=True):
        p = softmax(row)
        supervised += -math.log(p[label])
        supervised += brier * sum((p[c] - (1.0 if c == label else 0.0)) ** 2 for c in range(len(p)))
    unsupervised, labels, mask = 0.0, [], []
    for row_weak, row_strong in zip(weak.tolist(), strong.tolist(), strict=True):
        q = softmax(row_weak)
        labels.append(q.index(max(q)))
        mask.append(1.0 if max(q) >= threshold else 0.0)
        unsupervised += mask[-1] * -math.log(softmax(row_strong)[labels[-1]])
    return supervised / len(x), mu * unsupervised / len(weak), labels, mask


def logits(model: nn.Module, batch: SSLBatch, *, joint: bool) -> tuple[Tensor, ...]:
    """What FixMatch's forwards see, on a copy: BatchNorm's batch is the joint one, or that of each forward."""
    twin = copy.deepcopy(model)
    parts = [batch.x, batch.weak, batch.strong]
    with torch.no_grad():
        if joint:
            return twin(torch.cat(parts)).split([len(part) for part in parts])
        return tuple(copy.deepcopy(model)(part) for part in parts)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.5, 0.95])
@pytest.mark.parametrize("brier", [0.0, 0.7])
def test_joint_against_the_pseudo_code(threshold: float, brier: float) -> None:
    model = network()
    method = FixMatch(model, threshold=threshold, unlabeled_weight=1.5, brier_weight=brier)
    for batch in DATA:
        x, weak, strong = logits(model, batch, joint=True)
        supervised, unsupervised, labels, mask = pseudo_code(x, batch.y, weak, strong, threshold, 1.5, brier)
        out = method(batch)
        assert isinstance(out, StepOutput)
        assert float(out.loss.detach()) == pytest.approx(supervised + unsupervised, abs=1e-10)
        assert (out.pair.weak is batch.weak, out.pair.strong is batch.strong) == (True, True)
        assert out.pair.target.tolist() == labels
        assert out.pair.target.dtype == torch.int64
        assert out.pair.weight.tolist() == mask
        assert float(out.logs["loss_supervised"]) == pytest.approx(supervised, abs=1e-10)
        assert float(out.logs["loss_unsupervised"]) * 1.5 == pytest.approx(unsupervised, abs=1e-10)
        assert float(out.logs["mask_rate"]) == pytest.approx(sum(mask) / len(mask))


def test_split_against_the_pseudo_code() -> None:
    """joint=False: the weak view by a no-grad forward of its own; x and strong apart or together, as documented."""
    model = network().eval()  # running statistics: the split does not depend on the composition of the batch
    method = FixMatch(model, threshold=0.4, joint=False)
    for batch in DATA:
        supervised, unsupervised, labels, mask = pseudo_code(
            *(p for p in logits(model, batch, joint=False)[:1]),
            batch.y,
            *logits(model, batch, joint=False)[1:],
            0.4,
            1.0,
        )
        out = method(batch)
        assert float(out.loss.detach()) == pytest.approx(supervised + unsupervised, abs=1e-10)
        assert out.pair.target.tolist() == labels
        assert out.pair.weight.tolist() == mask


def test_joint_and_split_agree_without_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    results = []
    for joint in (True, False):
        out = FixMatch(model, threshold=0.4, joint=joint)(DATA[0])
        results.append((float(out.loss.detach()), compare.gradient_of(out.loss, model)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
    assert compare.relative(results[0][1], results[1][1]) <= 1e-10


def test_number_of_forwards_and_what_has_a_graph() -> None:
    for joint, allowed in ((True, {1}), (False, {2, 3})):
        model = network()
        count = training.Counter(model)
        FixMatch(model, joint=joint)(DATA[0])
        assert count.calls in allowed


def test_no_gradient_through_the_pseudo_label() -> None:
    """The gradient is that of the loss with labels and mask as constants."""
    model = network()
    twin = copy.deepcopy(model)
    out = FixMatch(model, threshold=0.4)(DATA[0])
    loss, _, _ = training.plain_fixmatch(twin, DATA[0], 0.4)
    assert compare.relative(compare.gradient_of(out.loss, model), compare.gradient_of(loss, twin)) <= 1e-10
    for tensor in (out.pair.target, out.pair.weight, out.pair.weak, out.pair.strong):
        assert not tensor.requires_grad


def test_the_mask_counts_the_threshold_itself() -> None:
    """max p >= tau, not >: on logits that give exactly one half."""
    model = nn.Linear(2, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    one = torch.ones(3, 2).double()
    out = FixMatch(model, threshold=0.5)(SSLBatch(one, torch.tensor([0, 1, 0]), one, one))
    assert out.pair.weight.tolist() == [1.0, 1.0, 1.0]


def test_logits_of_half_precision_are_taken_as_float32() -> None:
    """A confidence of .9501 is .949 in bfloat16: below the threshold."""

    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).bfloat16()

    torch.manual_seed(3)
    model, data = Half(4, 3), SSLBatch(torch.randn(5, 4), torch.arange(5) % 3, *torch.randn(2, 200, 4))
    weak = model(data.weak).float()
    threshold = float(weak.detach().softmax(1).amax(1).median())  # one of them, and no number of bfloat16
    out = FixMatch(model, threshold=threshold)(data)
    supervised, unsupervised, labels, mask = pseudo_code(
        model(data.x).float(), data.y, weak, model(data.strong).float(), threshold, mu=1.0
    )
    assert out.loss.dtype == torch.float32
    assert float(out.loss.detach()) == pytest.approx(supervised + unsupervised, rel=1e-5)
    assert out.pair.target.tolist() == labels
    assert out.pair.weight.tolist() == mask


def test_an_empty_mask_is_a_supervised_step() -> None:
    model = network()
    out = FixMatch(model, threshold=1.0)(DATA[0])
    assert out.pair.weight.sum() == 0
    assert float(out.logs["loss_unsupervised"]) == 0.0
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unlabeled_ramp() -> None:
    """mu(t) rises linearly from 0 over the first steps, then stays."""
    method = FixMatch(network(), unlabeled_weight=2.0, unlabeled_ramp_steps=4, threshold=0.0)
    weights = [float(method(batch).logs["unlabeled_weight"]) for batch in DATA[:7]]
    assert weights == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
