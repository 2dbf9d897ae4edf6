"""What holds for every method: the contract of a step, its state, bad batches, and its place in the wrapper."""

from __future__ import annotations

import copy
import inspect
import io
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import gradconsist.methods
from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, StepOutput
from gradconsist._inputs.cross_entropy import cross_entropy
from gradconsist.errors import (
    ConfigError,
    DeviceError,
    InputShapeError,
    InputTypeError,
    InputValueError,
    LossContractError,
    ModelError,
    StateError,
)
from gradconsist.methods import FixMatch, MeanTeacher, PseudoLabel
from support import methods as m
from support import training

DATA = m.data(8)
NAMES = sorted(m.METHODS)
INDEXED = ["flexmatch", "temporalensembling"]
# BatchNorm's, which are the model's affair.
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
PRIVATE = {"meanteacher": {"teacher"}}


def build(
    name: str, *, dropout: float = 0.0, around: Callable[[nn.Module], nn.Module] = lambda network: network
) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # MixMatch takes its seed from here
        return m.METHODS[name](around(m.network(dropout=dropout))).train()


def run(step: Any, batches: list[SSLBatch], optimizer: torch.optim.Optimizer) -> list[str]:
    losses = []
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = step(batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()).hex())
    return losses


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def test_all_methods_are_here() -> None:
    assert sorted(name.lower() for name in gradconsist.methods.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_step(name: str) -> None:
    method, batch = build(name), DATA[0]
    out = method(batch)
    assert isinstance(out, StepOutput)
    assert out.loss.dim() == 0
    assert out.pair.weak is batch.weak
    assert out.pair.strong is batch.strong
    assert out.pair.weight.shape == (9,)
    assert float(out.pair.weight.min()) >= 0
    assert float(out.pair.weight.max()) <= 1
    assert not out.pair.target.requires_grad
    assert not out.pair.weight.requires_grad
    logs = {key: float(value) for key, value in out.logs.items()}
    assert {"loss_supervised", "loss_unsupervised", "unlabeled_weight"} <= logs.keys()
    assert not any(getattr(value, "requires_grad", False) for value in out.logs.values())
    total = logs["loss_supervised"] + logs["unlabeled_weight"] * logs["loss_unsupervised"]
    assert float(out.loss.detach()) == pytest.approx(total + 0.3 * logs.get("loss_fairness", 0.0), abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_model_learns(name: str) -> None:
    method = build(name)
    before = copy.deepcopy(method.state_dict())
    run(method, DATA[:3], sgd(method))
    assert all(parameter.grad is not None for parameter in method.model.parameters())
    own = {id(parameter) for parameter in method.model.parameters()}
    assert own == {id(parameter) for parameter in method.parameters() if parameter.requires_grad}
    assert all(parameter.grad is None for parameter in method.parameters() if not parameter.requires_grad)
    after = method.state_dict()
    assert not torch.equal(before["model.0.weight"], after["model.0.weight"])
    assert method.step == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_run_continues_bitwise_from_a_file(name: str) -> None:
    whole = build(name, dropout=0.2)
    torch.manual_seed(1)
    expected = run(whole, DATA, torch.optim.SGD(whole.parameters(), lr=0.1))
    first = build(name, dropout=0.2)
    torch.manual_seed(1)
    losses = run(first, DATA[:4], torch.optim.SGD(first.parameters(), lr=0.1))
    file = io.BytesIO()
    torch.save({"method": first.state_dict(), "random": torch.get_rng_state()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    second = m.METHODS[name](m.network(dropout=0.2)).train()
    second.load_state_dict(stored["method"])
    torch.set_rng_state(stored["random"])
    losses += run(second, DATA[4:], torch.optim.SGD(second.parameters(), lr=0.1))
    assert losses == expected
    assert m.same_state(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_eval_mode_changes_no_state(name: str) -> None:
    method = build(name)
    run(method, DATA[:3], sgd(method))
    before = copy.deepcopy(method.state_dict())
    twice = [float(method.eval()(DATA[3]).loss.detach()) for _ in range(2)]
    assert twice[0] == twice[1]
    assert m.same_state(before, method.state_dict())
    random_before = torch.get_rng_state()
    method.train()(DATA[3])
    assert torch.equal(random_before, torch.get_rng_state())  # without dropout nothing is drawn from it
    assert method.step == 4


@pytest.mark.parametrize("name", [*NAMES, "fixmatch in two forwards"])
def test_gradients_under_autocast(name: str) -> None:
    """Each parameter has its own: half-precision copies that a forward without a graph leaves must not be used again.

    That is what torch 2.6 to 2.8 do; later versions pass without the remedy.
    """
    methods = {**m.METHODS, "fixmatch in two forwards": lambda net: FixMatch(net, threshold=0.45, joint=False)}
    batch = SSLBatch(*[part.float() if part.is_floating_point() else part for part in DATA[0]])
    found = []
    for enabled in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            method = methods[name](training.network(dropout=0.0)).train()
        method.step = 4  # past the ramps
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = method(batch).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in method.model.parameters())
        found.append(torch.cat([parameter.grad.flatten() for parameter in method.model.parameters()]))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_the_wrapper_adds_a_finite_term_and_parameters_move(name: str) -> None:
    method = build(name)
    wrapper = GGCRWrapper(method, GradientConsistencyLoss(method.model), weight=0.5, warmup_steps=0)
    optimizer = sgd(wrapper)
    before = copy.deepcopy(method.model.state_dict())
    compared = 0.0
    for batch in DATA[:4]:
        out = wrapper(batch)
        assert torch.isfinite(out.loss)
        assert torch.isfinite(out.logs["ggcr_loss"])
        compared += float(out.logs["ggcr_pairs"])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert compared > 0
    assert all(bool(torch.isfinite(p).all()) for p in method.parameters())
    assert not torch.equal(before["0.weight"], method.model.state_dict()["0.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_weight_0_is_the_bare_method_bitwise(name: str) -> None:
    bare, inner = build(name, dropout=0.2), build(name, dropout=0.2)
    wrapper = GGCRWrapper(inner, GradientConsistencyLoss(inner.model), weight=0.0, warmup_steps=0)
    runs = []
    for step, model in ((bare, bare.model), (wrapper, inner.model)):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        runs.append(training.train(lambda batch, step=step: step(batch).loss, model, DATA[:4], optimizer))
    assert runs[0] == runs[1]
    assert m.same_state(bare.state_dict(), inner.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_bad_batches(name: str) -> None:
    method, batch = build(name), DATA[0]
    with pytest.raises(InputTypeError, match="`batch` is of type Tensor"):
        method(batch.x)
    with pytest.raises(InputTypeError, match=r"`batch.strong` is of type NoneType, not a tensor: pass a tensor"):
        method(batch._replace(strong=None))
    with pytest.raises(InputShapeError, match="4 labeled inputs x, 2 labels y"):
        method(batch._replace(y=batch.y[:2]))
    with pytest.raises(InputShapeError, match="9 weak and 2 strong views"):
        method(batch._replace(strong=batch.strong[:2]))
    with pytest.raises(InputShapeError, match=r"`batch.weak` has an empty batch .*: skip the step"):
        method(SSLBatch(batch.x, batch.y, batch.weak[:0], batch.strong[:0], batch.index[:0]))
    with pytest.raises(InputShapeError, match=r"`batch.x` has an empty batch .*: skip the step"):
        method(batch._replace(x=batch.x[:0], y=batch.y[:0]))
    assert method.step == 0


class Named(nn.Module):
    """The network behind named inputs, constants among them; with an output that has logits, or with a tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor, on: torch.Tensor | None, mode: str, return_dict: bool) -> Any:
        assert mode == "plain"
        if on is not None:
            assert on.dtype == torch.bool
            pixels = pixels * on
        logits = self.network(pixels)
        return SimpleNamespace(logits=logits) if return_dict else ("hidden", logits)


def named(x: torch.Tensor, **constants: Any) -> dict[str, Any]:
    on = torch.ones_like(x, dtype=torch.bool)
    return {"pixels": x, "mode": "plain", "on": on, "return_dict": True, **constants}


# A mapping may be one of transformers' BatchEncoding, which is a UserDict.
KINDS = {"mapping": dict, "userdict": UserDict, "sequence": lambda given: [given[k] for k in ORDER], "tuple": UserDict}
ORDER = ("pixels", "on", "mode", "return_dict")


def with_the_term(method: Any, batches: list[SSLBatch], loss_fn: Any = None) -> list[str]:
    gc = GradientConsistencyLoss(method.model, loss_fn=loss_fn)
    losses = run(GGCRWrapper(method, gc, weight=0.5, warmup_steps=1), batches, sgd(method.model))
    assert gc.last.compared.any()
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_several_members(name: str) -> None:
    """The same numbers, the same bits, whether a model takes one tensor or several, with constants; the term on top."""
    expected = with_the_term(build(name), DATA[:3])
    for kind, make in KINDS.items():
        constants: dict[str, Any] = {"return_dict": kind != "tuple"}
        if name == "mixmatch":
            constants["on"] = None  # it mixes one tensor
        method, loss_fn, batches = build(name, around=Named), None, []
        for batch in DATA[:3]:
            views = {k: make(named(getattr(batch, k), **constants)) for k in ("x", "weak", "strong")}
            batches.append(batch._replace(**views))
        if kind == "tuple":
            method.logits_fn = lambda output: output[1]
            loss_fn = lambda output, target: cross_entropy(output[1], target)  # noqa: E731
        assert with_the_term(method, batches, loss_fn) == expected, kind


@pytest.mark.parametrize("name", NAMES)
def test_bad_inputs_of_several_members(name: str) -> None:
    method, batch = build(name, around=Named), DATA[0]
    good = batch._replace(x=named(batch.x), weak=named(batch.weak), strong=named(batch.strong))
    pixels = good.weak["pixels"]
    for change, error, match in (
        ({"weak": batch.weak}, InputTypeError, "`batch.x` and `batch.weak` are built differently"),
        ({"strong": {"pixels": pixels}}, InputTypeError, "`batch.x` and `batch.strong` are built differently"),
        (
            {"weak": named(pixels, on=None)},
            InputTypeError,
            r"`batch.x\['on'\]` is a tensor and .*weak\['on'\]` is None",
        ),
        ({"strong": named(pixels, mode="x")}, InputValueError, r"`batch.strong\['mode'\]` is 'x': .*the same in both"),
        ({"weak": named(pixels, on=pixels.numpy())}, InputTypeError, r"`batch.weak\['on'\]` is of type ndarray"),
        ({"x": {"text": ["a"] * 4}}, InputTypeError, r"`batch.x\['text'\]` is of type list, not a tensor: tokenize"),
        ({"x": ["a"] * 4}, InputTypeError, "`batch.x` holds no tensor: tokenize texts first"),
        ({"x": {}}, InputShapeError, "`batch.x` is empty"),
        ({"x": "text"}, InputTypeError, "`batch.x` is of type str, not a tensor: tokenize texts first"),
        ({"x": good.x | {"on": good.x["on"][:1]}}, InputShapeError, "`batch.x` mixes batch sizes"),
    ):
        with pytest.raises(error, match=match):
            method(good._replace(**change))
    assert method.step == 0


@pytest.mark.parametrize("name", NAMES)
def test_logits_fn(name: str) -> None:
    kind, options = type(build(name)), {"samples": m.SAMPLES, "classes": m.CLASSES}
    options = {key: value for key, value in options.items() if key in inspect.signature(kind).parameters}
    for bad in (3, "logits", nn.Flatten(), dict):
        with pytest.raises(ConfigError, match=r"`logits_fn` is .*: pass a function .* or None \(layers belong in the"):
            kind(m.network(), logits_fn=bad, **options)
    batch = SSLBatch(*(named(x, on=None, return_dict=False) if i in (0, 2, 3) else x for i, x in enumerate(DATA[0])))
    for function, match in (
        (None, r"returned a tuple \(str, tensor \[\d+, 3\]\) for \d+ inputs.*pass `logits_fn=`"),
        (
            lambda output: output[0],
            r"`logits_fn` returned a str for \d+ inputs, from a tuple \(str, ten.*return logits",
        ),
        (lambda output: output[1][:2], r"`logits_fn` returned a tensor \[2, 3\] for \d+ inputs"),
        (lambda output: output[1].sum(1), r"`logits_fn` returned a tensor \[\d+\] for \d+ inputs"),
        (lambda output: output[1].argmax(1, keepdim=True), r"`logits_fn` returned .*return logits \[B, C\], floating"),
    ):
        method = kind(Named(m.network()), logits_fn=function, **options)
        with pytest.raises(LossContractError, match=match):
            method(batch)


CALLS: dict[str, Callable[[nn.Module, SSLBatch], Any]] = {
    "4 positional arguments": lambda method, b: method(b.x, b.y, b.weak, b.strong),
    "the keywords 'x', 'y', 'weak', 'strong'": lambda method, b: method(x=b.x, y=b.y, weak=b.weak, strong=b.strong),
    "1 positional argument and the keyword 'index'": lambda method, b: method(b, index=b.index),
    "nothing": lambda method, b: method(),
}


@pytest.mark.parametrize("found", CALLS)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_one_argument(name: str, found: str) -> None:
    method, kind = build(name), type(build(name)).__name__
    with pytest.raises(InputTypeError, match=rf"{kind} was called with {found}, .*SSLBatch\(x, y, weak, strong\)"):
        CALLS[found](method, DATA[0])
    assert method.step == 0
    assert torch.isfinite(method(batch=DATA[0]).loss)


LABELS: list[tuple[str, Callable[[torch.Tensor], Any], type[Exception], str]] = [
    ("floats", lambda y: y.float(), InputTypeError, r"`batch\.y` is torch\.float32.*pass `y\.long\(\)` if it holds"),
    ("flags", lambda y: y > 0, InputTypeError, r"`batch\.y` is torch\.bool, expected class indices"),
    ("int32", lambda y: y.int(), InputTypeError, r"`batch\.y` is torch\.int32.*: pass `y\.long\(\)`\.$"),
    ("a column", lambda y: y[:, None], InputShapeError, r"`batch\.y` has shape \(.*, 1\).*`y\.flatten\(\)`"),
    ("one-hot", lambda y: nn.functional.one_hot(y), InputShapeError, r"`y\.argmax\(1\)` for rows"),
    ("too large", lambda y: y + 100, InputValueError, r"`batch\.y` has classes from 10\d to 10\d.*fewer logits"),
    ("NumPy", lambda y: y.numpy(), InputTypeError, r"`batch\.y` is of type ndarray.*torch\.from_numpy"),
    ("elsewhere", lambda y: y.to("meta"), DeviceError, r"`batch\.y` is on meta, the model on cpu: move it there"),
]


@pytest.mark.parametrize(("change", "error", "match"), [row[1:] for row in LABELS], ids=[row[0] for row in LABELS])
@pytest.mark.parametrize("name", NAMES)
def test_bad_labels(name: str, change: Callable[[torch.Tensor], Any], error: type[Exception], match: str) -> None:
    method = build(name)
    with pytest.raises(error, match=match):
        method(DATA[0]._replace(y=change(DATA[0].y)))
    assert method.step == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_fails_is_named(name: str) -> None:
    """By an input of another dtype than the model's float64."""
    method, batch = build(name), DATA[0]
    narrow = batch._replace(**{part: getattr(batch, part).float() for part in ("x", "weak", "strong")})
    match = r"`batch\.x`.*`batch\.weak`.*torch\.float32.* in `(model|teacher)\.\d+`.*`\.double\(\)`"
    with pytest.raises(ModelError, match=match):
        method(narrow)


class UsersError(RuntimeError):
    """An exception class that is not torch's."""


def test_a_models_own_exception_passes_unchanged() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise UsersError("as it is")

    method = build("fixmatch")
    method.model = Failing()
    with pytest.raises(UsersError, match=r"^as it is$"):
        method(DATA[0])


def test_a_list_of_samples_is_told_what_a_sequence_is() -> None:
    batch = DATA[0]
    with pytest.raises(InputShapeError, match="A sequence is one tensor for each argument of the model, not a list of"):
        build("fixmatch")(batch._replace(x=list(batch.x)))


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Flatten(), nn.Flatten(0)), nn.Sequential(nn.Flatten(), nn.Unflatten(0, (2, 11)))]
)
def test_a_model_without_logits_for_each_input_is_refused(model: nn.Module) -> None:
    method, batch = build("fixmatch"), DATA[0]
    method.model = model
    with pytest.raises(
        LossContractError, match=r"returned a tensor .* for 22 inputs, but a method needs logits \[B, C\]"
    ):
        method(batch)


class Pooled(nn.Module):
    """Takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean([2, 3]))


def test_views_that_are_forwarded_apart_may_differ_in_size() -> None:
    x, weak, strong = torch.randn(4, 3, 8, 8), torch.randn(5, 3, 6, 6), torch.randn(5, 3, 8, 8)
    y = torch.arange(4)
    for method in (FixMatch(Pooled(), joint=False), MeanTeacher(Pooled())):
        wrapper = GGCRWrapper(method, GradientConsistencyLoss(method.model), weight=0.5, warmup_steps=0)
        assert torch.isfinite(wrapper(SSLBatch(x, y, weak, strong)).loss)
    assert torch.isfinite(PseudoLabel(Pooled())(SSLBatch(x, y, strong, weak)).loss)
    with pytest.raises(InputShapeError, match=r"\(4, 3, 8, 8\).* and .*\(5, 3, 6, 6\).*forwarded as one batch: resize"):
        FixMatch(Pooled(), joint=True)(SSLBatch(x, y, weak, strong))


@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_is_not_remembered(name: str, where: int) -> None:
    """An infinite input in one step, whose gradient a trainer skips: what comes after is as if it had not been."""
    method, spared = build(name), build(name)
    for each in (method, spared):
        run(each, DATA[:where], torch.optim.SGD(each.parameters(), lr=0.1))
    weak, counters = DATA[where].weak.clone(), method.get_extra_state()
    weak[3] = torch.inf
    assert not torch.isfinite(method(DATA[where]._replace(weak=weak, strong=weak)).loss)
    method.set_extra_state(counters)
    remembered = [
        {key: value for key, value in each.state_dict().items() if not key.endswith(RUNNING)}
        for each in (method, spared)
    ]
    if name != "meanteacher":  # its teacher takes another part of the student at each call, a finite one
        assert m.same_state(*remembered)
    for batch in DATA[where + 1 : where + 3]:
        losses = [each(batch).loss for each in (method, spared)]
        assert torch.isfinite(losses[0])
        assert torch.equal(*losses) or name == "meanteacher"


@pytest.mark.parametrize("name", INDEXED)
def test_bad_indices(name: str) -> None:
    method, batch = build(name), DATA[0]
    before = copy.deepcopy(method.state_dict())
    for wrong, error, match in (
        (None, InputTypeError, "`batch.index` is NoneType: this method remembers each unlabeled sample"),
        (batch.index.float(), InputTypeError, "`batch.index` is torch.float32"),
        (batch.index[:2], InputShapeError, r"`batch.index` has shape \(2,\), expected \(9,\)"),
        (batch.index + m.SAMPLES, InputValueError, r"outside range\(13\): give `samples`"),
        (batch.index - 99, InputValueError, r"outside range\(13\)"),
    ):
        with pytest.raises(error, match=match):
            method(batch._replace(index=wrong))
    assert m.same_state(before, method.state_dict())


@pytest.mark.parametrize("name", ["freematch", "softmatch", "temporalensembling"])
def test_another_number_of_classes_is_refused(name: str) -> None:
    options = {"samples": 99} if name in INDEXED else {}
    with pytest.raises(ConfigError, match="`classes` is 4, but the model gives 3 logits"):
        type(build(name))(m.network(), classes=4, **options)(DATA[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_state_is_refused(name: str) -> None:
    for state in ({"steps": 3}, {"step": -1}, {"step": True}, 3):
        with pytest.raises(StateError, match="load the method's own"):
            build(name).set_extra_state(state)


@pytest.mark.parametrize("name", ["flexmatch", "temporalensembling"])
def test_counts_leave_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        method = m.METHODS[name](nn.Linear(5, m.CLASSES))
    method.to_empty(device="cpu")
    assert {str(value.device) for value in method.state_dict().values() if isinstance(value, torch.Tensor)} == {"cpu"}


@pytest.mark.parametrize("name", ["freematch", "softmatch", "temporalensembling", "flexmatch"])
def test_half_precision_narrows_the_model_and_not_the_state(name: str) -> None:
    method = m.METHODS[name](m.network().float()).bfloat16()
    states = [value for key, value in method.named_buffers() if not key.startswith("model.")]
    assert states
    assert all(value.dtype in (torch.float32, torch.int64) for value in states)
    assert next(method.model.parameters()).dtype == torch.bfloat16
    batch = DATA[0]
    out = method(SSLBatch(batch.x.bfloat16(), batch.y, batch.weak.bfloat16(), batch.strong.bfloat16(), batch.index))
    assert out.loss.dtype == torch.float32
    assert all(
        value.dtype in (torch.float64,) for k, value in method.double().named_buffers()
        if not k.startswith("model.") and value.is_floating_point()
    )  # fmt: skip
