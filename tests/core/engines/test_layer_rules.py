"""Rules that users register, the checker that tests them, and the report on a whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss, diagnostics
from gradconsist.engines import GhostEngine, register_rule, unregister_rule
from gradconsist.errors import ConfigError, LossContractError, UnsupportedModuleError
from support import compare, state
from support.layer_zoo import LAYER_CASES
from support.models import Layers, TiedLanguageModel
from support.oracle import judge
from support.zoo import CASES

DOUBLE = torch.float64


class Wave(nn.Module):
    """y = sin(factor * x) W + shift for x [N, ..., d]; a factor that its own gradient contains."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.factor, self.shift = nn.Parameter(torch.randn(inputs)), nn.Parameter(torch.randn(outputs))
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.factor * x) @ self.weight + self.shift


def _right(module: Any, x: Tensor, d: Tensor) -> dict[str, Tensor]:
    x, d = x.flatten(1, -2) if x.dim() > 2 else x[:, None], d.flatten(1, -2) if d.dim() > 2 else d[:, None]
    waves, inner = torch.sin(module.factor * x), torch.cos(module.factor * x)
    back = d @ module.weight.T
    return {"factor": (back * inner * x).sum(1), "weight": waves.transpose(1, 2) @ d, "shift": d.sum(1)}


def _changed(**changes: Callable[[Tensor], Tensor]) -> Callable[..., dict[str, Tensor]]:
    def rule(module: Any, x: Tensor, d: Tensor) -> dict[str, Tensor]:
        return {name: changes.get(name, lambda g: g)(g) for name, g in _right(module, x, d).items()}

    return rule


@pytest.fixture(autouse=True)
def _unregistered() -> Iterator[None]:
    yield
    for kind in (Wave, Pair, nn.Linear):
        with contextlib.suppress(ConfigError):
            unregister_rule(kind)


class Pair(nn.Module):
    """y = a * x + b * z: two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.a * x + self.b * z


class Model(nn.Module):
    """The layer on data, again after another layer, and beside a bare use of one of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.stem, self.again = Wave(5, 5), nn.Linear(5, 5), Wave(5, 4)
        self.pair, self.head = Pair(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 5]
        y = torch.tanh(self.first(x)) + torch.tanh(self.first(self.stem(x)))
        y = self.again(y.flatten(0, 1)).unflatten(0, y.shape[:2])  # rows that are no samples
        y = self.pair(torch.tanh(y), x[..., :4].cos()) * self.again.shift.sum()
        return self.head(torch.tanh(y).mean(1))


@pytest.mark.parametrize("stop", [None, "weak", "strong"])
@pytest.mark.parametrize("registered", [True, False])
def test_a_registered_rule_is_exact_in_a_model(registered: bool, stop: Any) -> None:
    """Used twice, on folded rows, with parameters in the formula, with a constant view."""
    if registered:
        register_rule(Wave, _right)
        register_rule(Pair, lambda module, x, d: {"a": (d * x[0]).sum(1), "b": (d * x[1]).sum(1)})
    model, target = Model().double(), torch.arange(4) % 3
    weak, strong = torch.randn(2, 4, 3, 5, dtype=DOUBLE)
    verdict = judge(model, weak, strong, target, stop_gradient=stop)
    before = state.snapshot(model)
    for form, fused, chunk_size in (("auto", True, 1), ("gram", False, None), ("gradient", True, 3)):
        engine = GhostEngine(form=form)  # type: ignore[arg-type]
        gc = GradientConsistencyLoss(model, engine=engine, fused=fused, chunk_size=chunk_size, stop_gradient=stop)
        loss = gc(weak, strong, target)
        assert state.differences(before, state.snapshot(model)) == []
        compare.assert_agrees(gc.last, loss, compare.gradient_of(loss, model), verdict, dtype=DOUBLE)
        assert compare.cosine_error(gc.measure(weak, strong, target).cosine, verdict.cosine) <= 1e-10


def test_a_rule_that_fails_leaves_no_trace() -> None:
    def broken(module: Any, x: Tensor, d: Tensor) -> dict[str, Tensor]:
        raise KeyError("boom")

    register_rule(Wave, broken)
    model = nn.Sequential(nn.Linear(5, 5), Wave(5, 3)).double()
    views = torch.randn(2, 4, 5, dtype=DOUBLE)
    before = state.snapshot(model)
    with pytest.raises(KeyError, match="boom"):
        GradientConsistencyLoss(model, engine="ghost")(*views, torch.arange(4) % 3)
    assert state.differences(before, state.snapshot(model)) == []


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (lambda module, x, d: {"factor": d.new_zeros(len(d), 5), "shift": d}, r"Wave returned nothing.*'weight'"),
        (_changed(weight=lambda g: g.transpose(1, 2)), r"Wave returned shape \(\d+, 3, 5\).*'weight'"),
        (_changed(shift=lambda g: g.sum(0)), r"shape \(3,\).*'shift'"),
        (lambda module, x, d: None, "Wave returned nothing"),
    ],
    ids=["missing", "transposed", "summed over samples", "none"],
)
def test_what_a_rule_must_return(rule: Any, match: str) -> None:
    register_rule(Wave, rule)
    model = nn.Sequential(nn.Linear(5, 5), Wave(5, 3)).double()
    views = torch.randn(2, 4, 5, dtype=DOUBLE)
    with pytest.raises(LossContractError, match=match):
        GradientConsistencyLoss(model, engine="ghost")(*views, torch.arange(4) % 3)


def test_a_layer_with_a_rule_returns_one_tensor() -> None:
    class Both(Wave):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    takes = Layers(lambda m, x: m.both(x)[0], both=Both(5, 3))
    register_rule(Both, _right)
    try:
        with pytest.raises(UnsupportedModuleError, match=r"Both.*returned a tuple.*unregister_rule"):
            GradientConsistencyLoss(takes, engine="ghost")(*torch.randn(2, 4, 5), torch.arange(4) % 3)
    finally:
        unregister_rule(Both)


def test_registering() -> None:
    class Sub(Wave):
        pass

    with pytest.raises(ConfigError, match="module_type"):
        register_rule("Wave", _right)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="module_type"):
        register_rule(Tensor, _right)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="gradients"):
        register_rule(Wave, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no registered rule"):
        unregister_rule(Wave)
    register_rule(Wave, _changed(shift=torch.zeros_like))
    with pytest.raises(ConfigError, match=r"unregister_rule\(Wave\)"):
        register_rule(Wave, _right)
    assert diagnostics.check_rule(Sub(3, 2), torch.randn(3, 3)).ok, "subclasses do not inherit the (wrong) rule"
    assert not diagnostics.check_rule(Wave(3, 2), torch.randn(3, 3)).ok


# -- check_rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (4, 1, 2, 4)])
def test_a_right_rule_passes(shape: tuple[int, ...]) -> None:
    register_rule(Wave, _right)
    layer = Wave(4, 3)
    before = state.of_model(layer)
    report = diagnostics.check_rule(layer, torch.randn(shape))
    assert report.ok, str(report)
    assert report.failure is None
    assert max(report.errors.values()) <= 1e-10
    assert "agrees" in str(report)
    assert state.differences(before, state.of_model(layer)) == []


WRONG: dict[str, Any] = {
    "transposed": _changed(weight=lambda g: g.transpose(1, 2)),
    "missing factor": _changed(factor=lambda g: 0.5 * g),
    "sign": _changed(weight=torch.neg),
    "scale": lambda module, x, d: {k: 2.0 * g for k, g in _right(module, x, d).items()},
    "missing bias": lambda module, x, d: {k: g for k, g in _right(module, x, d).items() if k != "shift"},
    "zero bias": _changed(shift=torch.zeros_like),
    "mean over samples": _changed(shift=lambda g: g.mean(0).expand_as(g)),
    "detached input": lambda module, x, d: _right(module, x.detach(), d),
    "detached gradient": _changed(factor=lambda g: g.detach()),
    "detached output gradient": lambda module, x, d: _right(module, x, d.detach()),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_rule_is_caught(wrong: str) -> None:
    """Wrong in value, or right in value and wrong in its derivative. The weight is square: shapes do not tell."""
    register_rule(Wave, WRONG[wrong])
    report = diagnostics.check_rule(Wave(4, 4), torch.randn(3, 4))
    assert not report.ok, str(report)
    assert ("DISAGREES" in str(report)) or ("FAILED" in str(report))


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(4, 3), (torch.randn(3, 2, 4),)),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (torch.randn(2, 4, 5, 4),)),
        (nn.ConvTranspose1d(2, 3, 3, stride=2), (torch.randn(3, 2, 5),)),
        (nn.Embedding(7, 3), (torch.randint(7, (4, 5)),)),
        (nn.GRU(4, 3, 2, batch_first=True, bidirectional=True), (torch.randn(3, 2, 4),)),
        (nn.GroupNorm(2, 4), (torch.randn(3, 4, 5),)),
        (nn.Bilinear(3, 4, 2), (torch.randn(3, 3), torch.randn(3, 4))),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_check_rule_on_the_layers_of_torch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    report = diagnostics.check_rule(layer, *inputs)
    assert report.ok, str(report)


def test_check_rule_needs_parameters_and_two_samples() -> None:
    with pytest.raises(ConfigError, match="two samples"):
        diagnostics.check_rule(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(ConfigError, match="inputs"):
        diagnostics.check_rule(nn.Linear(3, 2))
    with pytest.raises(ConfigError, match="no trainable parameters"):
        diagnostics.check_rule(nn.Tanh(), torch.randn(3, 3))
    report = diagnostics.check_rule(nn.Linear(3, 2), torch.randn(3, 5))
    assert not report.ok
    assert "FAILED" in str(report)


# -- check -------------------------------------------------------------------------------------------------------------

ALL = {**CASES, **LAYER_CASES}
REPORTED = ["mlp", "wrn_slice", "vit", "tied_embedding", "bare_parameters", "frozen_subset", "mlp_encoder", "lstm",
            "data_dependent", "text_dict", "idle", "shared", "cnn_batchnorm_mixed", "spectral_norm_eval"]  # fmt: skip


@pytest.mark.parametrize("engine", ["auto", "ghost", "loop", "vmap"])
@pytest.mark.parametrize("name", REPORTED)
def test_the_report_lists_every_parameter(name: str, engine: str) -> None:
    problem = ALL[name].problem()
    case = problem.case
    before = state.snapshot(problem.model)
    report = diagnostics.check(
        GradientConsistencyLoss(problem.model, encoder=case.encoder, loss_fn=case.loss_fn, engine=engine),
        *problem.views,
    )
    assert state.differences(before, state.snapshot(problem.model)) == []
    assert [row.parameter for row in report.rows] == [name for name, _ in problem.model.named_parameters()]
    assert [row.size for row in report.rows] == [p.numel() for p in problem.model.parameters()]
    refused = getattr(case, engine, "exact") == "refused"
    assert report.ok != refused
    text = str(report)
    for row, (parameter, tensor) in zip(report.rows, problem.model.named_parameters(), strict=True):
        assert row.route, parameter
        assert row.parameter in text
        assert row.module == parameter.rpartition(".")[0]
        compared = tensor.requires_grad and (case.encoder is None or case.encoder(parameter))
        if not tensor.requires_grad:
            assert "frozen" in row.route
        elif not refused and not compared:
            assert "not compared" in row.route
        elif not refused:
            assert "not compared" not in row.route
    if refused:
        assert "REFUSED" in text
        assert "engine='loop'" in str(report.refusal)
    if engine == "auto":
        assert (report.fallback is not None) == (case.ghost == "refused")


def test_the_routes() -> None:
    def route(name: str, parameter: str) -> str:
        problem = ALL[name].problem()
        report = diagnostics.check(
            GradientConsistencyLoss(problem.model, encoder=problem.case.encoder, engine="ghost"), *problem.views
        )
        return next(row.route for row in report.rows if row.parameter == parameter)

    assert "linear" in route("mlp", "0.weight")
    assert "bias" in route("mlp", "0.bias")
    assert "convolution" in route("wrn_slice", "0.weight")
    assert "per-sample gradient" in route("bare_parameters", "scale")
    assert "2 uses" in route("shared", "a.weight")
    assert "embedding" in route("tied_embedding", "embedding.weight")
    assert "linear" in route("tied_embedding", "embedding.weight")
    assert "zero" in route("idle", "unused")
    register_rule(nn.Linear, lambda module, x, d: {"weight": d[:, :, None] * x[:, None], "bias": d})
    assert "registered rule of Linear" in route("mlp", "0.weight")


@pytest.mark.parametrize(("length", "form"), [(3, "gram"), (30, "gradient")])
def test_a_tied_table_takes_one_hot_rows_for_short_texts_only(
    monkeypatch: pytest.MonkeyPatch, length: int, form: str
) -> None:
    """They have as many numbers per position as the table has rows: of a long text, more than a table per sample."""
    one_hot, made = F.one_hot, list[int]()
    monkeypatch.setattr(F, "one_hot", lambda ids, n: made.append(ids.dim()) or one_hot(ids, n))  # type: ignore[func-returns-value]
    torch.manual_seed(0)
    model = TiedLanguageModel(vocabulary=7, width=24).double()
    weak, strong, target = *torch.randint(0, 7, (2, 5, length), dtype=torch.int32), torch.randint(0, 7, (5,))
    gc = GradientConsistencyLoss(model, engine="ghost")
    rows = diagnostics.check(gc, weak, strong, target).rows
    assert next(row.route for row in rows if row.parameter == "embedding.weight").endswith(
        f"{form} form (2 uses as one)"
    )
    gc(weak, strong, target)
    assert (2 in made) == (form == "gram")  # targets have one dimension
    compare.assert_exact(gc, (weak, strong, target), judge(model, weak, strong, target))


@pytest.mark.parametrize("form", ["gradient", "gram"])
def test_the_form_of_a_route_is_the_one_that_runs(form: Any) -> None:
    problem = ALL["mlp"].problem()
    rows = diagnostics.check(GradientConsistencyLoss(problem.model, engine=GhostEngine(form=form)), *problem.views).rows
    assert [row.route for row in rows if row.parameter.endswith("weight")] == [f"linear, {form} form"] * 3
    assert [row.route for row in rows if row.parameter.endswith("bias")] == ["bias, gradient form"] * 3


def test_the_notes_say_which_statistics_are_held() -> None:
    problem = ALL["cnn_batchnorm_mixed"].problem()
    joint, running = "BatchNorm2d with joint statistics of both views", "BatchNorm2d with running statistics"
    for batchnorm, first, second in (("auto", running, joint), ("batch", joint, joint), ("running", running, running)):
        notes = diagnostics.check(GradientConsistencyLoss(problem.model, batchnorm=batchnorm), *problem.views).notes
        assert notes["1"].startswith(first)
        assert notes["4"].startswith(second)


def test_a_model_that_nothing_takes() -> None:
    centred = Layers(lambda _, x: x - x.mean(0))
    model = nn.Sequential(nn.Linear(5, 4), centred, nn.Linear(4, 3))
    x = torch.randn(4, 5)
    report = diagnostics.check(GradientConsistencyLoss(model), x, x.flip(0), torch.arange(4) % 3)
    assert not report.ok
    assert str(report).startswith("REFUSED: ")
    assert "`model.1` (Layers)" in str(report).splitlines()[0]
    assert [row.route for row in report.rows] == ["refused"] * 4
