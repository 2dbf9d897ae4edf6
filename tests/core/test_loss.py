"""GradientConsistencyLoss: reductions, weights, subsets of the pairs, constant views, degenerate pairs, records."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss, engines
from gradconsist._consistency import comparison
from gradconsist._consistency.similarity import cosine
from gradconsist.errors import ConfigError, GradModeError, StateError
from gradconsist.types import GradProducts
from support import compare
from support.zoo import CASES, Problem

ENGINES = pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])


def problem(name: str = "mlp", **options: int) -> Problem:
    return CASES[name].problem(**options)


def gradient(gc: GradientConsistencyLoss, p: Problem, *extra: Tensor, cotangent: Tensor | None = None) -> Tensor:
    return compare.gradient_of(gc(*p.views, *extra), p.model, cotangent)


# -- reduction ---------------------------------------------------------------------------------------------------------


@ENGINES
@FUSED
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction: str, fused: bool, engine: str) -> None:
    p, weight = problem(), torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    verdict = CASES["mlp"].verdict(weight, reduction=reduction)
    gc = GradientConsistencyLoss(p.model, engine=engine, reduction=reduction, fused=fused, chunk_size=2)
    loss = gc(*p.views, weight)
    assert loss.shape == ()
    assert abs(float(loss.detach()) - float(verdict.loss)) <= 1e-10
    assert compare.relative(compare.gradient_of(loss, p.model), verdict.flat) <= 1e-8


@ENGINES
def test_reduction_none_has_a_graph_for_each_pair(engine: str) -> None:
    p, weight = problem(), torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    cotangent = torch.tensor([1.0, 5.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    verdict = p.judge(weight, reduction="none").verdict(cotangent)
    gc = GradientConsistencyLoss(p.model, engine=engine, reduction="none", fused=False, chunk_size=2)
    loss = gc(*p.views, weight)
    assert loss.shape == (5,)
    torch.testing.assert_close(loss.detach(), verdict.loss, rtol=0.0, atol=1e-10)
    assert compare.relative(compare.gradient_of(loss, p.model, cotangent), verdict.flat) <= 1e-8


@FUSED
def test_backward_scales_with_the_cotangent(fused: bool) -> None:
    """0.1 * gc(...), a GradScaler's factor and a loss in two sums arrive as factors; an outer graph is respected."""
    p = problem()
    reference = p.judge().verdict().flat
    gc = GradientConsistencyLoss(p.model, fused=fused)
    assert compare.relative(compare.gradient_of(-0.125 * gc(*p.views), p.model), -0.125 * reference) <= 1e-8
    loss = gc(*p.views)
    assert compare.relative(compare.gradient_of(loss + 2 * loss, p.model), 3.0 * reference) <= 1e-8
    factor = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = gc(*p.views)
    assert compare.relative(compare.gradient_of(factor * loss, p.model), 3.0 * reference) <= 1e-8
    torch.testing.assert_close(factor.grad, loss.detach(), rtol=1e-12, atol=0.0)
    parts = torch.autograd.grad(gc(*p.views), list(p.model.parameters()))
    assert compare.relative(torch.cat([g.reshape(-1) for g in parts]), reference) <= 1e-8


@FUSED
def test_a_second_backward_of_one_loss_gives_the_same_gradient(fused: bool) -> None:
    """Neither a retained graph nor the gradient that was handed out shares memory with what the loss keeps."""
    p = problem()
    reference = p.judge().verdict().flat
    loss = 0.25 * GradientConsistencyLoss(p.model, fused=fused)(*p.views)
    loss.backward(retain_graph=True)
    for parameter in p.model.parameters():
        parameter.grad.mul_(3.0)
    loss.backward(retain_graph=True)
    total = torch.cat([q.grad.reshape(-1) for q in p.model.parameters()])
    assert compare.relative(total, (3 + 1) * 0.25 * reference) <= 1e-8
    p.model.zero_grad(set_to_none=True)
    assert compare.relative(compare.gradient_of(loss, p.model), 0.25 * reference) <= 1e-8


def test_a_third_derivative_beside_another_term_is_refused() -> None:
    """A penalty on the gradient of a whole loss: the fused part is a constant there, and must not read as zero."""
    p = problem()
    parameters = list(p.model.parameters())
    total = F.cross_entropy(p.model(p.weak), p.target) + GradientConsistencyLoss(p.model)(*p.views)
    for factor in (1.0, torch.ones([], dtype=torch.float64, requires_grad=True)):
        gradient = torch.autograd.grad(factor * total, parameters, create_graph=True)
        penalty = sum(part.square().sum() for part in gradient)
        for wanted in (parameters, parameters[-1:]):
            with pytest.raises(GradModeError, match="pass `fused=False`"):
                torch.autograd.grad(penalty, wanted, retain_graph=True)


@FUSED
def test_a_term_without_pairs_has_every_derivative(fused: bool) -> None:
    """It is a zero, and so are its derivatives: a penalty on the gradient of the whole loss goes on."""
    p = problem()
    parameters = list(p.model.parameters())
    found = []
    for term in (0.0, GradientConsistencyLoss(p.model, fused=fused)(*p.views, torch.zeros(5))):
        total = F.cross_entropy(p.model(p.weak), p.target) + term
        gradient = torch.autograd.grad(total, parameters, create_graph=True)
        penalty = sum(part.square().sum() for part in gradient)
        found.append(torch.cat([part.flatten() for part in torch.autograd.grad(penalty, parameters)]))
    assert torch.equal(*found)


# -- weights -----------------------------------------------------------------------------------------------------------


@ENGINES
@FUSED
@pytest.mark.parametrize("weight", [torch.zeros(5), torch.zeros(5, dtype=torch.bool)], ids=["float", "bool"])
def test_all_weights_zero_is_a_zero_with_a_graph(weight: Tensor, fused: bool, engine: str) -> None:
    p = problem()
    gc = GradientConsistencyLoss(p.model, engine=engine, fused=fused)
    loss = gc(*p.views, weight)
    assert float(loss.detach()) == 0.0
    assert loss.requires_grad
    loss.backward()
    for parameter in p.model.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    assert not gc.last.compared.any()
    summary = gc.last.summary()
    assert summary["pairs"] == 5
    assert summary["compared"] == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_a_mask_may_have_any_real_dtype(dtype: torch.dtype) -> None:
    p = problem()
    mask = torch.tensor([1, 0, 1, 1, 0])
    reference = p.judge(mask).verdict()
    gc = GradientConsistencyLoss(p.model)
    assert compare.relative(gradient(gc, p, mask.to(dtype)), reference.flat) <= 1e-8


@pytest.mark.parametrize("name", ["weak", "strong", "weight"])
def test_a_graph_into_the_views_or_the_weight_is_not_dropped_silently(name: str) -> None:
    """The fused form has gradients for the model's parameters only, and says so; the graph form has them all."""
    p = problem()
    arguments = {"weak": p.weak, "strong": p.strong, "target": p.target, "weight": torch.ones(5, dtype=torch.float64)}
    arguments[name].requires_grad_(True)
    with pytest.raises(ConfigError, match=rf"`{name}` requires grad.*detach"):
        GradientConsistencyLoss(p.model)(**arguments)
    GradientConsistencyLoss(p.model, fused=False)(**arguments).backward()
    assert bool(arguments[name].grad.any())


def test_a_target_with_a_graph_is_a_constant() -> None:
    """A pseudo-label that was not detached does not leak a gradient into the model."""
    p = problem("mlp_soft_target")
    with torch.no_grad():
        target = torch.softmax(p.model(p.weak) * 0.5, 1)
    reference = gradient(GradientConsistencyLoss(p.model), Problem(p.case, p.model, p.weak, p.strong, target))
    attached = torch.softmax(p.model(p.weak) * 0.5, 1)
    value = gradient(GradientConsistencyLoss(p.model), Problem(p.case, p.model, p.weak, p.strong, attached))
    assert compare.relative(value, reference) <= 1e-12


# -- max_pairs ---------------------------------------------------------------------------------------------------------


def _by_subset(name: str, weight: Tensor, k: int) -> dict[tuple[int, ...], tuple[float, Tensor]]:
    positive = [i for i, w in enumerate(weight.tolist()) if w > 0]
    found = {}
    for subset in itertools.combinations(positive, k):
        chosen = torch.zeros(5, dtype=torch.float64)
        chosen[list(subset)] = len(positive) / k
        verdict = CASES[name].verdict(weight * chosen)
        found[subset] = float(verdict.loss), verdict.flat
    return found


@ENGINES
@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_train"])
def test_max_pairs_is_unbiased(name: str, engine: str) -> None:
    """Each subset's value and gradient are exactly the rescaled ones, and the mean over all subsets is the whole."""
    p, weight = problem(name), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    expected = _by_subset(name, weight, 2)
    gc = GradientConsistencyLoss(p.model, engine=engine, max_pairs=2)
    seen: dict[tuple[int, ...], tuple[float, Tensor]] = {}
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        loss = gc(*p.views, weight, generator=generator)
        subset = tuple(gc.last.compared.nonzero().flatten().tolist())
        assert abs(float(loss.detach()) - expected[subset][0]) <= 1e-10
        if subset not in seen:
            seen[subset] = float(loss.detach()), compare.gradient_of(loss, p.model)
            assert compare.relative(seen[subset][1], expected[subset][1]) <= 1e-8
        if len(seen) == len(expected):
            break
    assert seen.keys() == expected.keys()
    whole = CASES[name].verdict(weight)
    assert abs(sum(v for v, _ in seen.values()) / len(seen) - float(whole.loss)) <= 1e-10
    assert compare.relative(torch.stack([g for _, g in seen.values()]).mean(0), whole.flat) <= 1e-8


def test_max_pairs_draws_every_subset_equally_often() -> None:
    p, weight = problem(), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    gc = GradientConsistencyLoss(p.model, max_pairs=2, engine="vmap")
    draws = 150
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(draws):
        gc.measure(*p.views, weight, generator=torch.Generator().manual_seed(seed))
        counts[tuple(gc.last.compared.nonzero().flatten().tolist())] += 1
    if all(len(subset) == 4 for subset in counts):
        pytest.fail("measure ignores max_pairs: expected the subset of the call")
    expected = draws / 6
    chi_square = sum((counts[s] - expected) ** 2 / expected for s in itertools.combinations((0, 1, 3, 4), 2))
    assert sum(counts.values()) == draws
    assert chi_square < 20.5  # 99.9th percentile at 5 degrees of freedom


@pytest.mark.parametrize("max_pairs", [4, 5, 100])
def test_max_pairs_above_the_number_of_pairs_changes_nothing(max_pairs: int) -> None:
    p, weight = problem(), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    reference = p.judge(weight).verdict()
    gc = GradientConsistencyLoss(p.model, max_pairs=max_pairs)
    before = gc.state_dict()
    assert compare.relative(gradient(gc, p, weight), reference.flat) <= 1e-8
    assert int(gc.last.compared.sum()) == 4
    assert str(before) == str(gc.state_dict()), "no draw is needed where all pairs fit"


def test_max_pairs_has_a_generator_of_its_own() -> None:
    """The global stream is not consumed; state_dict continues the sequence of subsets."""
    p = problem()

    def subsets(gc: GradientConsistencyLoss, n: int) -> list[list[bool]]:
        found = []
        for _ in range(n):
            gc(*p.views)
            found.append(gc.last.compared.tolist())
        return found

    gc = GradientConsistencyLoss(p.model, max_pairs=2)
    state = torch.random.get_rng_state()
    subsets(gc, 3)
    saved = gc.state_dict()
    expected = subsets(gc, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len({tuple(s) for s in expected}) > 1
    fresh = GradientConsistencyLoss(p.model, max_pairs=2)
    fresh.load_state_dict(saved)
    assert subsets(fresh, 8) == expected


# -- stop_gradient -----------------------------------------------------------------------------------------------------


STOPPED = ["mlp", "cnn_batchnorm_train", "vit"]


@ENGINES
@pytest.mark.parametrize("view", ["weak", "strong"])
@pytest.mark.parametrize("name", STOPPED)
def test_stop_gradient(name: str, view: str, engine: str) -> None:
    """Both forms in turn; in every model of both zoos under the ghost engine: test_ghost."""
    p, verdict = problem(name), CASES[name].verdict(stop_gradient=view)
    fused = (STOPPED.index(name) + (view == "weak") + (engine == "ghost")) % 2 == 0
    gc = GradientConsistencyLoss(p.model, engine=engine, fused=fused, stop_gradient=view, chunk_size=2)
    compare.assert_exact(gc, p.views, verdict)


# -- degenerate pairs --------------------------------------------------------------------------------------------------


def _with_a_degenerate_pair(name: str = "mlp_soft_target") -> Problem:
    """Pair 1: the target is the weak view's own prediction, so its gradient is zero up to rounding."""
    p = problem(name)
    with torch.no_grad():
        p.target[1] = torch.softmax(p.model(p.weak), 1)[1]
    return p


@ENGINES
@FUSED
def test_a_target_equal_to_the_own_prediction_is_degenerate(fused: bool, engine: str) -> None:
    p = _with_a_degenerate_pair()
    verdict = p.judge().verdict()
    assert verdict.degenerate.tolist() == [False, True, False, False, False]
    for chunk_size in (1, 2, None):
        gc = GradientConsistencyLoss(p.model, engine=engine, fused=fused, chunk_size=chunk_size)
        loss = gc(*p.views)
        assert gc.last.degenerate.tolist() == verdict.degenerate.tolist()
        assert gc.last.cosine[1].isnan()
        assert not gc.last.cosine[[0, 2, 3, 4]].isnan().any()
        assert gc.last.norm_weak[1] <= 1e-8
        assert abs(float(loss.detach()) - float(verdict.loss)) <= 1e-10
        assert compare.relative(compare.gradient_of(loss, p.model), verdict.flat) <= 1e-8
        assert gc.last.summary()["degenerate"] == 1


@ENGINES
def test_a_target_equal_to_the_own_prediction_is_degenerate_in_float32(engine: str) -> None:
    """There the difference of two roundings, 6e-8, is above min_norm: its direction is noise all the same."""
    p = CASES["mlp_soft_target"].problem(dtype=torch.float32)
    with torch.no_grad():
        p.target[1] = torch.softmax(p.model(p.weak), 1)[1]
    gc = GradientConsistencyLoss(p.model, engine=engine)
    gc(*p.views)
    assert gc.last.degenerate.tolist() == [False, True, False, False, False]
    assert gc.last.norm_weak[1] == 0


@ENGINES
@pytest.mark.parametrize("margin", [5.0, 9.0, 13.0])
def test_a_confident_gradient_keeps_its_direction_in_float32(margin: float, engine: str) -> None:
    """The residual of a confident sample is 1e-2 to 1e-6; taken from 1 it would have the digits of 6e-8."""
    p = CASES["mlp"].problem(dtype=torch.float32)
    with torch.no_grad():
        p.model[4].bias.copy_(torch.tensor([margin, 0.0, 0.0]))
        p.target.zero_()
    verdict = p.judge().verdict()
    gc = GradientConsistencyLoss(p.model, engine=engine)
    gc(*p.views)
    assert not gc.last.degenerate.any()
    assert float(verdict.norm_weak.max()) < 50 * math.exp(-margin)
    assert compare.cosine_error(gc.last.cosine, verdict.cosine) <= 2e-5
    assert compare.relative(gc.last.norm_weak / verdict.norm_weak, torch.ones(5)) <= 2e-4


@ENGINES
@FUSED
def test_every_pair_degenerate_is_a_zero_with_a_graph(fused: bool, engine: str) -> None:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    x, target = torch.randn(4, 3).double(), torch.full((4, 2), 0.5).double()  # the prediction is (0.5, 0.5) exactly
    gc = GradientConsistencyLoss(model, engine=engine, fused=fused)
    loss = gc(x, torch.randn(4, 3).double(), target)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert gc.last.degenerate.all()
    assert gc.last.cosine.isnan().all()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@ENGINES
def test_min_norm_is_a_floor_on_each_norm(engine: str) -> None:
    p = problem()
    norms = p.judge().verdict()
    smaller = torch.minimum(norms.norm_weak, norms.norm_strong)
    for min_norm in smaller.sort().values[[0, 2]].tolist():
        for above in (0.999, 1.001):
            verdict = p.judge(min_norm=min_norm * above).verdict()
            gc = GradientConsistencyLoss(p.model, engine=engine, min_norm=min_norm * above)
            compare.assert_exact(gc, p.views, verdict)
            assert gc.last.degenerate.tolist() == (smaller <= min_norm * above).tolist()


def test_the_degenerate_do_not_spread_through_extreme_scales() -> None:
    """One pair with a gradient near 1e-30, one near 1e15: the others are exact, nothing is NaN."""
    p = CASES["mlp"].problem(dtype=torch.float32)
    scale = torch.tensor([1.0, 1e-30, 1.0, 1e15, 1.0])

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        index, factor = target[:, 0].long(), target[:, 1]
        return factor * F.cross_entropy(output, index, reduction="none")

    target = torch.stack([p.target.float(), scale], dim=1)
    gc = GradientConsistencyLoss(p.model, loss_fn=loss_fn)
    loss = gc(p.weak, p.strong, target)
    flat = compare.gradient_of(loss, p.model)
    assert gc.last.degenerate.tolist() == [False, True, False, False, False]
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    verdict = p.judge(weight).verdict()
    assert abs(float(loss.detach()) - float(verdict.loss)) <= 2e-5
    assert compare.relative(flat, verdict.flat) <= 2e-4


def test_rounding_does_not_leave_the_bounds_of_a_cosine() -> None:
    square = torch.rand(1000) + 0.5
    assert bool((square / square.sqrt() / square.sqrt() > 1).any()), "else nothing is tested"
    for sign in (1.0, -1.0):
        value = cosine(GradProducts(square, square, sign * square), torch.zeros(1000, dtype=torch.bool))
        assert float(value.abs().max()) == 1.0


# -- records -----------------------------------------------------------------------------------------------------------


@ENGINES
def test_last_and_measure(engine: str) -> None:
    p = problem()
    gc = GradientConsistencyLoss(p.model, engine=engine)
    assert gc.last is None
    gc(*p.views)
    for value in vars(gc.last).values() if hasattr(gc.last, "__dict__") else ():
        assert not value.requires_grad
    assert gc.last.cosine.shape == gc.last.degenerate.shape == gc.last.compared.shape == (5,)
    assert gc.last.degenerate.dtype == gc.last.compared.dtype == torch.bool
    measured = gc.measure(*p.views)
    torch.testing.assert_close(measured.cosine, gc.last.cosine, rtol=0.0, atol=1e-12)
    assert measured.cosine.grad_fn is None
    with pytest.raises(AttributeError, match="cosine"):
        measured.cosine = measured.norm_weak


def test_summary() -> None:
    p = _with_a_degenerate_pair()
    gc = GradientConsistencyLoss(p.model)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    gc(*p.views, weight)
    summary = gc.last.summary()
    expected = {"pairs", "compared", "degenerate", "cosine_mean", "norm_weak_mean", "norm_strong_mean"}
    assert summary.keys() == expected
    assert all(isinstance(value, (int, float)) for value in summary.values())
    verdict = p.judge().verdict()
    assert (summary["pairs"], summary["compared"], summary["degenerate"]) == (5, 4, 1)
    assert summary["cosine_mean"] == pytest.approx(float(verdict.cosine[[0, 3, 4]].mean()), abs=1e-10)


@ENGINES
@pytest.mark.parametrize("name", ["cnn_batchnorm_train", "vit", "dropout", "text_dict"])
def test_measure_under_no_grad_and_in_eval_mode(name: str, engine: str) -> None:
    p = problem(name)
    gc = GradientConsistencyLoss(p.model, engine=engine)
    reference = CASES[name].verdict()
    with torch.no_grad():
        assert compare.cosine_error(gc.measure(*p.views).cosine, reference.cosine) <= 1e-10
    p.model.eval()
    reference = p.judge().verdict()
    assert compare.cosine_error(gc.measure(*p.views).cosine, reference.cosine) <= 1e-10
    with torch.no_grad():
        assert compare.cosine_error(gc.measure(*p.views).cosine, reference.cosine) <= 1e-10
    assert all(parameter.grad is None for parameter in p.model.parameters())


def test_the_loss_owns_no_parameters_and_is_no_submodule() -> None:
    p = problem()
    gc = GradientConsistencyLoss(p.model)
    assert not isinstance(gc, nn.Module)

    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.consistency = p.model, gc

    assert {key.split(".")[0] for key in Trainer().state_dict()} == {"model"}


def test_repr_names_what_it_does() -> None:
    text = repr(GradientConsistencyLoss(problem().model, engine="loop", max_pairs=3))
    assert "GradientConsistencyLoss" in text
    assert "loop" in text.lower()
    assert "max_pairs=3" in text


def test_inputs_are_not_written_to() -> None:
    for name in ("mlp_inplace_relu", "wrn_slice", "text_dict"):
        p = problem(name)
        before = str(p.views)
        GradientConsistencyLoss(p.model)(*p.views).backward()
        assert str(p.views) == before


def test_non_contiguous_views() -> None:
    p = problem("cnn_batchnorm_train")
    reference = p.judge().verdict()
    weak = p.weak.transpose(2, 3).contiguous().transpose(2, 3)
    strong = p.strong.flip(0).flip(0).to(memory_format=torch.channels_last)
    for engine in ("loop", "vmap", "ghost"):
        loss = GradientConsistencyLoss(p.model, engine=engine)(weak, strong, p.target)
        assert compare.relative(compare.gradient_of(loss, p.model), reference.flat) <= 1e-8


class Spy(engines.LoopEngine):
    """Keeps the sizes of all chunks, and has memory for so many pairs."""

    def __init__(self, most: int = 100, room: int = 100) -> None:
        self.most_pairs, self.room, self.sizes = most, room, list[int]()

    def products(self, problem: engines.Problem) -> GradProducts:
        self.sizes.append(len(problem.target))
        if len(problem.target) > self.room:
            raise torch.OutOfMemoryError("simulated")
        return super().products(problem)


@pytest.mark.parametrize(("pairs", "sizes"), [(23, [8, 8, 7]), (22, [11, 11]), (11, [11]), (12, [6, 6]), (1, [1])])
def test_automatic_chunks_are_of_about_equal_size(pairs: int, sizes: list[int]) -> None:
    """A rest of one pair would take as long as a chunk of several."""
    weak = torch.randn(pairs, 4)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    spy = Spy(most=11)
    GradientConsistencyLoss(model, engine=spy)(weak, weak + 0.1 * torch.randn(pairs, 4), torch.arange(pairs) % 3)
    assert spy.sizes[-len(sizes) :] == sizes


@pytest.mark.parametrize(
    ("usual", "limit", "busy", "size", "options"),
    [
        (0, 2, 12, 6, {}),
        (0, 9, 4, 4, {}),
        (0, 9, 1, 1, {}),
        (0, 9, 1, 2, {"stop_gradient": "weak"}),  # separate batches, half as large
        (2, 9, 1, 6, {}),
        (9, 9, 1, 12, {}),
    ],
)
def test_automatic_chunks_follow_the_memory_of_a_pair(
    usual: int, limit: int, busy: int, size: int, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph of a pair keeps about 300 kB besides the parameters, which all pairs share; the limits are in MB."""
    layers = nn.Conv2d(1, 8, 3), nn.Tanh(), nn.AvgPool2d(30), nn.Flatten(), nn.Linear(8, 3)
    model, x, spy = nn.Sequential(*layers), torch.randn(12, 1, 32, 32), Spy()
    monkeypatch.setitem(comparison._CHUNK_BYTES, "cpu", usual * 10**6)
    monkeypatch.setitem(comparison._MOST_BYTES, "cpu", limit * 10**6)
    monkeypatch.setattr(comparison, "_MANY", 11)
    monkeypatch.setattr(comparison, "_BUSY_PAIRS_OF_MANY", busy)
    GradientConsistencyLoss(model, engine=spy, **options)(x, x + 0.1, torch.arange(12) % 3)
    assert spy.sizes[0] == 1
    assert set(spy.sizes[1:]) == {size}


def test_a_chunk_that_fitted_is_remembered_and_part_of_the_state() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(16, 4)
    small = Spy(room=5)
    sizes = small.sizes
    gc, again = (GradientConsistencyLoss(model, engine=small) for _ in range(2))
    assert set(gc.state_dict()) == {"generator"}
    target = torch.arange(16) % 3
    expected = GradientConsistencyLoss(model, engine="loop")(x, x + 0.1, target)
    torch.testing.assert_close(gc(x, x + 0.1, target), expected)
    assert sizes == [1, 16, 8, 4, 4, 4, 4]
    sizes.clear()
    again.load_state_dict(gc.state_dict())
    assert torch.equal(gc(x, x + 0.1, target), again(x, x + 0.1, target))
    assert sizes == [4, 4, 4, 4, 1, 4, 4, 4, 4]
    for wrong in (torch.tensor(0), torch.tensor(2.0)):
        with pytest.raises(StateError, match=r"`state\['chunk'\]` is .*, expected a count: pass"):
            again.load_state_dict(gc.state_dict() | {"chunk": wrong})
    strict = gc.with_options(chunk_size=8)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        strict(x, x + 0.1, target)
