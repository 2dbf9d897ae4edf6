"""MeanTeacher, PiModel and TemporalEnsembling against their papers' pseudo-code, in plain loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss, SSLBatch
from gradconsist.methods import MeanTeacher, PiModel, TemporalEnsembling
from support import compare
from support import methods as m

DATA = m.data(7)
C = m.CLASSES


def ramp(step: int, steps: int) -> float:
    return math.exp(-5 * (1 - min(1, step / steps)) ** 2) if steps else 1.0


def squared(one, two, known=None) -> float:
    """Mean over samples and classes; samples that are not known count as zero."""
    known = [1.0] * len(one) if known is None else known
    return m.mean(
        [k * (a - b) ** 2 for k, p, q in zip(known, one, two, strict=True) for a, b in zip(p, q, strict=True)]
    )


def numbers(model: nn.Module) -> list[list[float]]:
    return [parameter.detach().flatten().tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("decay", [0.99, 0.6])
def test_mean_teacher_against_the_pseudo_code(decay: float) -> None:
    """Five optimizer steps; the teacher is averaged by hand, with alpha = min(1 - 1/(t+1), decay)."""
    model = m.network()
    method = MeanTeacher(model, ema_decay=decay, unlabeled_weight=7.0, unlabeled_ramp_steps=3).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    average = numbers(model)
    statistics = copy.deepcopy(model[1])  # the teacher's own BatchNorm
    for step, batch in enumerate(DATA[:5]):
        alpha = min(1 - 1 / (step + 1), decay)
        average = [
            [alpha * a + (1 - alpha) * b for a, b in zip(mine, other, strict=True)]
            for mine, other in zip(average, numbers(model), strict=True)
        ]
        teacher = copy.deepcopy(model)
        for parameter, values in zip(teacher.parameters(), average, strict=True):
            parameter.data = torch.tensor(values, dtype=torch.float64).view_as(parameter)
        with torch.no_grad():
            target = m.softmaxes(teacher(batch.weak).numpy())  # in train mode: statistics of the weak views alone
            statistics(teacher[0](batch.weak))
        x, strong = m.arrays(*m.outputs(model, batch.x, batch.strong))
        expected = m.mean(m.cross_entropy(x, batch.y)) + 7 * ramp(step, 3) * squared(m.softmaxes(strong), target)
        out = method(batch)
        assert float(out.loss.detach()) == pytest.approx(expected, abs=1e-9)
        assert out.pair.target.tolist() == [pytest.approx(row.tolist(), abs=1e-10) for row in target]
        assert out.pair.weight.tolist() == pytest.approx([ramp(step, 3)] * 9)
        assert [pytest.approx(row, abs=1e-12) for row in numbers(method.teacher)] == average
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert torch.allclose(method.teacher[1].running_mean, statistics.running_mean, atol=1e-12)
    assert not torch.allclose(method.teacher[1].running_mean, model[1].running_mean, atol=1e-3)


def test_the_kth_root_of_the_decay_is_for_accumulation_over_k_batches() -> None:
    """As the documents say: three calls between two updates of the student move the teacher as one call otherwise."""
    teachers = []
    for k in (1, 3):
        model = m.network()
        method = MeanTeacher(model, ema_decay=0.9 ** (1 / k))
        method(DATA[0])  # a copy
        method.step = 1000  # past min(1 - 1 / (t + 1), .)
        with torch.no_grad():
            model[0].weight.add_(1.0)
        for batch in DATA[:k]:
            method(batch)
        teachers.append(method.teacher[0].weight)
    torch.testing.assert_close(*teachers)


def test_the_first_call_copies_weights_that_were_loaded_later() -> None:
    model = m.network()
    method = MeanTeacher(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.add_(0.5)
    method(DATA[0])
    assert numbers(method.teacher) == numbers(model)


def test_only_the_student_learns_and_the_teacher_is_a_constant() -> None:
    model, batch = m.network(), DATA[0]
    method = MeanTeacher(model, unlabeled_weight=7.0)
    out = method(batch)
    out.loss.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in method.teacher.parameters())
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    twin = m.network()
    x, strong = twin(torch.cat([batch.x, batch.strong])).split([4, 9])
    loss = F.cross_entropy(x, batch.y) + 7 * (strong.softmax(1) - out.pair.target).square().mean()
    assert compare.relative(found, compare.gradient_of(loss, twin)) <= 1e-10


@pytest.mark.parametrize("joint", [True, False])
def test_the_pi_model_against_the_pseudo_code(joint: bool) -> None:
    model = m.network()
    method = PiModel(model, unlabeled_weight=7.0, unlabeled_ramp_steps=3, joint=joint).train()
    for step, batch in enumerate(DATA[:5]):
        if joint:
            x, one, two = m.arrays(*m.outputs(model, batch.x, batch.weak, batch.strong))
        else:
            x, one = m.arrays(*m.outputs(model, batch.x, batch.weak))
            (two,) = m.arrays(*m.outputs(model, batch.strong))
        one, two = m.softmaxes(one), m.softmaxes(two)
        expected = m.mean(m.cross_entropy(x, batch.y)) + 7 * ramp(step, 3) * squared(one, two)
        out = method(batch)
        assert float(out.loss.detach()) == pytest.approx(expected, abs=1e-10)
        assert out.pair.target.tolist() == [int(row.argmax()) for row in one + two]
        assert out.pair.weight.tolist() == pytest.approx([ramp(step, 3)] * 9)
        assert not out.pair.weight.requires_grad


def test_close_views_of_the_pi_model_have_gradients_that_agree() -> None:
    """With the mean of both passes as target the two residuals are opposite, and close views would be driven apart."""
    model, batch = m.network(), DATA[0]
    batch = batch._replace(strong=batch.weak + 1e-3 * torch.randn_like(batch.weak))
    pair = PiModel(model)(batch).pair
    record = GradientConsistencyLoss(model).measure(pair.weak, pair.strong, pair.target)
    assert float(record.cosine.min()) > 0.99
    mean = (model(pair.weak).softmax(1) + model(pair.strong).softmax(1)).detach() / 2
    assert float(GradientConsistencyLoss(model).measure(pair.weak, pair.strong, mean).cosine.max()) < -0.9


def test_the_pi_model_has_gradients_through_both_passes() -> None:
    model, batch = m.network(), DATA[0]
    found = compare.gradient_of(PiModel(model, unlabeled_weight=7.0)(batch).loss, model)
    gradients = {}
    for held in ("neither", "first"):
        twin = m.network()
        x, one, two = twin(torch.cat([batch.x, batch.weak, batch.strong])).split([4, 9, 9])
        one = one.detach() if held == "first" else one
        loss = F.cross_entropy(x, batch.y) + 7 * (one.softmax(1) - two.softmax(1)).square().mean()
        gradients[held] = compare.gradient_of(loss, twin)
    assert compare.relative(found, gradients["neither"]) <= 1e-10
    assert compare.relative(found, gradients["first"]) > 1e-3


class Memory:
    """Z and the number of visits of each sample, by hand."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.z = [[0.0] * C for _ in range(m.SAMPLES)]
        self.visits = [0] * m.SAMPLES

    def target(self, i: int) -> list[float]:
        if self.visits[i] == 0:
            return [1 / C] * C
        return [value / (1 - self.alpha ** self.visits[i]) for value in self.z[i]]

    def visit(self, index: list[int], z) -> None:
        for i in set(index):
            own = [row for j, row in zip(index, z, strict=True) if j == i]
            average = [m.mean([row[c] for row in own]) for c in range(C)]
            self.z[i] = [self.alpha * a + (1 - self.alpha) * b for a, b in zip(self.z[i], average, strict=True)]
            self.visits[i] += 1


def test_temporal_ensembling_against_the_pseudo_code() -> None:
    model = m.network()
    method = TemporalEnsembling(
        model, samples=m.SAMPLES, classes=C, unlabeled_weight=7.0, unlabeled_ramp_steps=3, ema_decay=0.7
    ).train()
    paper = Memory(0.7)
    for step, batch in enumerate(DATA):
        x, weak = m.arrays(*m.outputs(model, batch.x, batch.weak))
        z, index = m.softmaxes(weak), batch.index.tolist()
        targets, known = [paper.target(i) for i in index], [float(paper.visits[i] > 0) for i in index]
        expected = m.mean(m.cross_entropy(x, batch.y)) + 7 * ramp(step, 3) * squared(z, targets, known)
        paper.visit(index, z)
        out = method(batch)
        assert float(out.loss.detach()) == pytest.approx(expected, abs=1e-10)
        assert out.pair.target.tolist() == [pytest.approx(row, abs=1e-10) for row in targets]
        assert out.pair.weight.tolist() == pytest.approx([ramp(step, 3) * k for k in known])
        assert method.ensemble.tolist() == [pytest.approx(row, abs=1e-12) for row in paper.z]
        assert method.visits.tolist() == paper.visits
        if step == 0:
            assert float(out.logs["loss_unsupervised"]) == 0.0  # w(0) = 0
    assert max(paper.visits) > 3


def test_with_one_visit_an_epoch_it_is_the_papers_algorithm_by_epochs() -> None:
    """Algorithm 2 of the paper: Z and its corrected copy are renewed at the end of an epoch of three batches."""
    model, alpha = nn.Linear(5, C).double(), 0.6
    method = TemporalEnsembling(model, samples=9, classes=C, ema_decay=alpha)
    x, y = DATA[0].x, DATA[0].y
    big, target = torch.zeros(9, C).double(), torch.zeros(9, C).double()
    for epoch in range(1, 5):
        order, z = torch.randperm(9, generator=torch.Generator().manual_seed(epoch)), torch.zeros(9, C).double()
        for index in order.split(3):
            u = torch.randn(3, 5, generator=torch.Generator().manual_seed(epoch)).double()
            z[index] = model(u).softmax(1).detach()
            weight = 0.0 if epoch == 1 else 1.0
            expected = weight * (z[index] - target[index]).square().mean()
            found = method(SSLBatch(x, y, u, u, index)).logs["loss_unsupervised"]
            assert float(found) == pytest.approx(float(expected), abs=1e-12)
            with torch.no_grad():
                model.weight.add_(0.1 * torch.randn(C, 5, generator=torch.Generator().manual_seed(7)).double())
        big = alpha * big + (1 - alpha) * z
        target = big / (1 - alpha**epoch)


def test_the_ensemble_is_a_constant() -> None:
    model, (first, second) = m.network(), DATA[:2]
    method = TemporalEnsembling(model, samples=m.SAMPLES, classes=C, unlabeled_weight=7.0)
    method(first)
    out = method(second)
    found = compare.gradient_of(out.loss, model)
    twin = m.network()
    x, weak = twin(torch.cat([second.x, second.weak])).split([4, 9])
    difference: Tensor = out.pair.weight[:, None] * (weak.softmax(1) - out.pair.target).square()
    assert 0 < float(out.pair.weight.sum()) < 9
    loss = F.cross_entropy(x, second.y) + 7 * difference.mean()
    assert compare.relative(found, compare.gradient_of(loss, twin)) <= 1e-10
