"""GGCRWrapper: each promise of the contract, one by one."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, RandomProjection, SSLBatch, StepOutput, ViewPair
from gradconsist._forward.observer import Observer
from gradconsist.engines import GradProducts, LoopEngine, Problem
from gradconsist.engines.projection import KINDS
from gradconsist.errors import (
    ConfigError,
    GradConsistError,
    InputShapeError,
    InputValueError,
    LossContractError,
    StateError,
    UnsupportedModuleError,
)
from gradconsist.methods import FixMatch
from support import compare, state, training
from support.methods import same_state
from support.models import Layers
from support.nets import net
from support.oracle import Judge

DATA = [SSLBatch(*batch) for batch in training.batches(20)]
ENGINES = pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
THRESHOLD = 0.37  # passes some pairs of every batch and never all


class Method(nn.Module):
    """FixMatch by hand, with state of its own, returning whatever `form` says."""

    def __init__(self, model: nn.Module, form: str = "output") -> None:
        super().__init__()
        self.model, self.form = model, form
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: Any, *, scale: float = 1.0) -> Any:
        self.seen += 1
        loss, label, mask = training.plain_fixmatch(self.model, batch, THRESHOLD)
        loss = scale * loss
        pair = ViewPair(batch.weak, batch.strong, label, mask)
        self.latest = label, mask
        return {
            "output": StepOutput(loss, pair, {"mask": float(mask.mean())}),
            "no pair": StepOutput(loss, None),
            "tensor": loss,
            "mapping": {"loss": loss, "mask": mask},
            "tuple": (loss, mask),
            "tuple of mapping": ({"loss": loss}, mask),
            "tuple of output": (StepOutput(loss, pair), mask),
        }[self.form]


def pair_from_call(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> ViewPair:
    batch = args[0] if args else kwargs["batch"]
    return ViewPair(batch.weak, batch.strong, torch.arange(len(batch.weak)) % 3)


def make(seed: int = 0, *, dropout: float = 0.2, form: str = "output", **options: Any) -> tuple[Method, GGCRWrapper]:
    loss_options = options.pop("loss", {})
    method = Method(training.network(dropout=dropout, seed=seed), form)
    options = {"warmup_steps": 0, **options}
    return method, GGCRWrapper(method, GradientConsistencyLoss(method.model, **loss_options), **options)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def expected_term(method: Method, batch: SSLBatch, **options: Any) -> float:
    """L_g of this batch at the method's present parameters, by the oracle."""
    label, mask = method.latest
    return Judge(method.model, batch.weak, batch.strong, label, options.pop("weight", mask), **options).value()


# -- bitwise the plain method ------------------------------------------------------------------------------------------

INACTIVE = {
    "weight 0": {"weight": 0.0, "warmup_steps": 0},
    "warm-up": {"weight": 0.1, "warmup_steps": 20},
    "weight 0 and ramp": {"weight": 0.0, "warmup_steps": 2, "ramp_steps": 5, "every": 2},
    "no pair": {"form": "no pair"},
    "a function without a pair": {"form": "tensor", "pair_fn": lambda *_: None},
}


@pytest.mark.parametrize("batchnorm", ["auto", "observed"])
@pytest.mark.parametrize("name", INACTIVE)
def test_inactive_it_is_bitwise_the_plain_method(name: str, batchnorm: str) -> None:
    """20 steps: loss, gradients, buffers, random stream, method state, and no forward but those of the first step."""
    plain = Method(training.network())
    count = training.Counter(plain.model)
    torch.manual_seed(5)
    reference = training.train(lambda b: plain(b).loss, plain, DATA, sgd(plain))
    assert count.calls == 20

    method, wrapper = make(loss={"max_pairs": 3, "dropout": "on", "batchnorm": batchnorm}, **INACTIVE[name])
    count, calls = training.Counter(method.model), []
    torch.manual_seed(5)
    log = training.train(lambda b: (wrapper(b).loss, calls.append(count.calls))[0], method, DATA, sgd(wrapper))
    assert log == reference
    assert [after - before for before, after in itertools.pairwise(calls)] == [1] * 19
    assert (calls[0] > 1) == (name == "warm-up"), "tried where it will come"
    assert wrapper.step == 20


def _pair(change: Callable[[ViewPair], Any]) -> dict[str, Any]:
    """A pair function that does something wrong with a good pair."""
    return {"pair_fn": lambda args, *_: change(ViewPair(args[0].weak, args[0].strong, torch.arange(6) % 3))}


#: What is wrong, by (model, form of the method, options), and words of the error.
MISTAKES = {
    **{
        f"no pair_fn for a {form}": (training.network, form, {}, LossContractError, "give `pair_fn")
        for form in ("tensor", "mapping", "tuple")
    },
    "no pair": (training.network, "tensor", _pair(tuple), LossContractError, "`pair_fn` returned tuple: return ViewP"),
    "views of other lengths": (training.network, "tensor", _pair(lambda p: p._replace(strong=p.strong[1:])),
        InputShapeError, "`weak` has 6 samples and `strong`"),
    "few labels": (training.network, "tensor", _pair(lambda p: p._replace(target=p.target[1:])), InputShapeError,
        "`target`"),
    "negative weights": (training.network, "tensor", _pair(lambda p: p._replace(weight=-torch.ones(6))),
        InputValueError, "`weight`"),
    "a model that mixes its batch": (lambda: net(lambda net, x: net.stem(x - x.mean(0))).float(), "output", {},
        UnsupportedModuleError, "changes with the other samples"),
    "no observable forward": (training.network, "tensor",
        {"pair_fn": lambda args, *_: ViewPair(args[0].x, args[0].x + 1, args[0].y), "batchnorm": "observed"},
        ConfigError, "batchnorm='observed'` needs"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_show_on_the_first_step(name: str) -> None:
    build, form, options, kind, words = MISTAKES[name]
    method = Method(build(), form)
    gc = GradientConsistencyLoss(method.model, batchnorm=options.pop("batchnorm", "auto"))
    wrapper = GGCRWrapper(method, gc, **{"warmup_steps": 1000, **options})
    for _ in range(2):  # and on every step until it is mended
        with pytest.raises(kind, match=words):
            wrapper(DATA[0])
    assert wrapper.step == 0


def test_the_trial_waits_for_a_pair_and_comes_once() -> None:
    """A confident pair is not needed: the method may be confident of none for long."""
    steps = itertools.count()

    def pair_fn(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> ViewPair | None:
        weak, strong = args[0].weak, args[0].strong
        none = torch.zeros(len(weak), dtype=torch.long)
        return ViewPair(weak, strong, none, none) if next(steps) > 1 else None

    method, wrapper = make(warmup_steps=50, pair_fn=pair_fn)
    count = training.Counter(method.model)
    forwards = []
    for batch in DATA[:6]:
        before = count.calls
        wrapper(batch)
        forwards.append(count.calls - before)
    assert forwards[:2] == [1, 1]
    assert forwards[2] > 1
    assert forwards[3:] == [1, 1, 1]
    with torch.no_grad():  # evaluated in train mode: nothing to try
        make(warmup_steps=50, form="tensor")[1](DATA[0])


def test_the_trial_changes_nothing_that_follows() -> None:
    """A wrapper that has tried, and one that never needed to, do the same from the warm-up's end on."""

    def run(*, tried: bool) -> tuple[Any, list[float]]:
        torch.manual_seed(3)  # which the loss takes its own seed from
        method, wrapper = make(
            loss={"max_pairs": 2, "dropout": "on"}, warmup_steps=2,
            pair_fn=lambda args, *_: ViewPair(args[0].weak, args[0].strong, torch.randint(3, (len(args[0].weak),))),
        )  # fmt: skip
        wrapper._tried = not tried
        torch.manual_seed(3)
        np_random = np.random.get_state()[1].tolist()
        log = training.train(lambda b: wrapper(b).loss, method, DATA[:5], sgd(wrapper))
        assert np.random.get_state()[1].tolist() == np_random
        assert wrapper.consistency._calls == 3
        return log, wrapper.consistency.last.cosine.nan_to_num(9.0).tolist()

    assert run(tried=True) == run(tried=False)


def test_the_term_leaves_buffers_random_state_and_method_state_alone() -> None:
    """Active: the gradients gain the term, and nothing else differs from the plain method."""
    plain, (method, wrapper) = Method(training.network()), make(weight=0.3)
    torch.manual_seed(5)
    plain(DATA[0]).loss.backward()
    after = state.of_process()["random state"], {k: state.digest(v) for k, v in plain.state_dict().items()}
    torch.manual_seed(5)
    wrapper(DATA[0]).loss.backward()
    assert after == (
        state.of_process()["random state"],
        {k: state.digest(v) for k, v in method.state_dict().items()},
    )


# -- the term ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])
def test_loss_and_gradient_are_base_plus_weight_times_term(fused: bool) -> None:
    method, wrapper = make(weight=0.7, dropout=0.0, loss={"fused": fused})
    method.double()
    batch = SSLBatch(*(v.double() if v is not None and v.is_floating_point() else v for v in DATA[0]))
    twin = copy.deepcopy(method)
    base = twin(batch).loss
    base.backward()
    plain = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    out = wrapper(batch)
    label, mask = method.latest
    assert 0 < float(mask.sum()) < len(mask), "the gate matters in this test"
    verdict = Judge(method.model, batch.weak, batch.strong, label, mask).verdict()
    assert float(out.loss.detach()) == pytest.approx(float(base.detach()) + 0.7 * float(verdict.loss), abs=1e-10)
    assert float(out.logs["ggcr_loss"]) == pytest.approx(float(verdict.loss), abs=1e-10)
    assert compare.relative(compare.gradient_of(out.loss, method), plain + 0.7 * verdict.flat) <= 1e-8


def test_gate_all_compares_every_pair() -> None:
    method, wrapper = make(weight=1.0, dropout=0.0, gate="all")
    out = wrapper(DATA[0])
    every = expected_term(method, DATA[0], weight=torch.ones(6))
    assert float(out.logs["ggcr_loss"]) == pytest.approx(every, abs=2e-5)
    assert float(out.logs["ggcr_loss"]) != pytest.approx(expected_term(method, DATA[0]), abs=1e-3)


#: Options of the schedule, and the weight that the term has in each step.
SCHEDULES = [
    ({"weight": 0.1, "warmup_steps": 3}, [0, 0, 0, 0.1, 0.1, 0.1]),
    ({"weight": 0.5, "warmup_steps": 2, "ramp_steps": 4}, [0, 0, 0.125, 0.25, 0.375, 0.5, 0.5]),
    ({"weight": 0.5, "warmup_steps": 3, "ramp_steps": 4, "every": 2}, [0, 0, 0, 0.25, 0, 0.75, 0, 1.0, 0, 1.0]),
]


@pytest.mark.parametrize(("options", "weights"), SCHEDULES, ids=["warm-up", "ramp", "every"])
def test_the_weight_of_each_step(options: dict[str, Any], weights: list[float]) -> None:
    """From the warm-up's end on, every k-th step, with a share of k times the weight that grows from its first part."""
    model = training.network(dropout=0.0)
    pair = ViewPair(DATA[0].weak, DATA[0].strong, torch.zeros(6, dtype=torch.long))
    wrapper = GGCRWrapper(lambda: StepOutput(torch.zeros([]), pair), GradientConsistencyLoss(model), **options)
    count = training.Counter(model)
    for step, weight in enumerate(weights):
        before = count.calls
        out = wrapper()
        assert (count.calls > before) == (weight > 0 or step == 0), "no forward but the trial's"
        assert float(out.logs["ggcr_weight"]) == pytest.approx(weight)
        assert float(out.loss.detach()) == pytest.approx(weight * float(out.logs.get("ggcr_loss", 0.0)), rel=1e-6)


def test_logs() -> None:
    """The method's own logs pass through; ours tell what was compared."""
    method, wrapper = make()
    out = wrapper(DATA[0])
    assert isinstance(out, StepOutput)
    assert out.logs["mask"] == pytest.approx(float(method.latest[1].mean()))
    for key in ("ggcr_weight", "ggcr_loss", "ggcr_cosine", "ggcr_degenerate", "ggcr_pairs"):
        value = out.logs[key]
        assert isinstance(value, (float, int)) or (isinstance(value, Tensor) and value.dim() == 0), key
        assert not (isinstance(value, Tensor) and value.requires_grad), key
    assert isinstance(out.pair, ViewPair)
    assert -1 <= float(out.logs["ggcr_cosine"]) <= 1
    assert float(out.logs["ggcr_pairs"]) == float(method.latest[1].sum())


# -- methods of any form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "mapping", "tuple", "tuple of mapping"])
def test_other_outputs_with_a_pair_function(form: str) -> None:
    seen: list[tuple[Any, ...]] = []

    def pair_fn(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> ViewPair:
        seen.append((args, kwargs, output))
        return pair_from_call(args, kwargs, output)

    method, wrapper = make(form=form, dropout=0.0, weight=0.3, pair_fn=pair_fn)
    base = float(training.plain_fixmatch(copy.deepcopy(method.model), DATA[0], THRESHOLD)[0].detach())
    out = wrapper(DATA[0], scale=2.0)
    assert len(seen) == 1
    args, kwargs, output = seen[0]
    assert args[0] is DATA[0]
    assert kwargs == {"scale": 2.0}
    assert isinstance(output, {"tensor": Tensor, "mapping": dict}.get(form, tuple))
    term = Judge(method.model, *pair_from_call((DATA[0],), {}, None)[:3]).value()
    assert float(out.loss.detach()) == pytest.approx(2 * base + 0.3 * term, abs=2e-5)
    assert isinstance(out, StepOutput)


def test_a_tuple_may_begin_with_a_step_output() -> None:
    method, wrapper = make(form="tuple of output", dropout=0.0, weight=0.3)
    base = float(training.plain_fixmatch(copy.deepcopy(method.model), DATA[0], THRESHOLD)[0].detach())
    out = wrapper(DATA[0])
    assert float(out.loss.detach()) == pytest.approx(base + 0.3 * expected_term(method, DATA[0]), abs=2e-5)


@pytest.mark.parametrize("value", [None, "loss", 3, {"los": torch.zeros(())}, (), object()])
def test_an_output_without_a_loss_is_refused(value: object) -> None:
    model = training.network()
    wrapper = GGCRWrapper(lambda b: value, GradientConsistencyLoss(model), warmup_steps=0, pair_fn=pair_from_call)
    with pytest.raises(GradConsistError, match="method"):
        wrapper(DATA[0])


# -- state -------------------------------------------------------------------------------------------------------------


def test_a_generators_state_may_be_a_row_of_gathered_ones() -> None:
    """torch itself crashes on a view that does not begin at its storage's beginning."""
    _, wrapper = make(loss={"max_pairs": 2})
    own = wrapper.consistency.state_dict()["generator"]
    other = torch.Generator().manual_seed(5).get_state()
    wrapper.consistency.load_state_dict({"generator": torch.stack([own, other])[1]})
    assert torch.equal(wrapper.consistency.state_dict()["generator"], other)


def test_parameters_are_the_methods_parameters() -> None:
    method, wrapper = make()
    assert {id(p) for p in wrapper.parameters()} == {id(p) for p in method.parameters()}
    assert len(list(wrapper.parameters())) == len(list(method.parameters()))


#: Options of the loss, some of which draw in each call that has the term.
RESUMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_pairs": {"max_pairs": 2},
    "dropout": {"dropout": "on", "engine": "loop"},
    **{kind: {"max_pairs": 3, "projection": RandomProjection(2, kind, resample_every=2)} for kind in KINDS},
}


@pytest.mark.parametrize("loss", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_continues_bitwise(loss: dict[str, Any], tmp_path: Path) -> None:
    """Through a file read with weights_only=True, in every phase: warm-up, ramp, after it."""

    def build(seed: int) -> tuple[GGCRWrapper, torch.optim.Optimizer]:
        _, wrapper = make(seed=seed, loss=loss, weight=0.4, warmup_steps=3, ramp_steps=5, every=2)
        return wrapper, sgd(wrapper)

    def train(wrapper: GGCRWrapper, optimizer: torch.optim.Optimizer, data: list[SSLBatch]) -> list[Any]:
        return training.train(lambda b: wrapper(b).loss, wrapper.method, data, optimizer)

    torch.manual_seed(3)
    wrapper, optimizer = build(0)
    whole, stops = [], (1, 4, 7, 13)
    for at, batch in enumerate(DATA[:16]):
        if at in stops:
            saved = {"wrapper": wrapper.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**saved, "random": torch.random.get_rng_state()}, tmp_path / f"{at}.pt")
        whole += train(wrapper, optimizer, [batch])
    for at in stops:
        torch.manual_seed(1234)
        fresh, again = build(99)
        saved = torch.load(tmp_path / f"{at}.pt", weights_only=True)
        fresh.load_state_dict(saved["wrapper"])
        again.load_state_dict(saved["optimizer"])
        torch.random.set_rng_state(saved["random"])
        assert train(fresh, again, DATA[at:16]) == whole[at:], at


def test_the_state_of_a_method_that_is_no_module_comes_back() -> None:
    class Plain:
        def __init__(self) -> None:
            self.model, self.calls = nn.Linear(4, 3), 0

        def __call__(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.model(x).sum()

        def state_dict(self) -> dict[str, int]:
            return {"calls": self.calls}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

    def wrapper() -> GGCRWrapper:
        method = Plain()
        return GGCRWrapper(method, GradientConsistencyLoss(method.model), weight=0.0)

    first, second = wrapper(), wrapper()
    for _ in range(3):
        first(torch.randn(2, 4))
    second.load_state_dict(first.state_dict())
    assert (second.method.calls, second.step) == (3, 3)
    with pytest.raises(StateError, match=r"expected \['consistency', 'method', 'step'\]"):
        second.load_state_dict({"_extra_state": {"step": 0, "consistency": first.consistency.state_dict()}})


def _fixmatch(seed: int) -> GGCRWrapper:
    model = training.network(dropout=0.0, seed=seed)
    return GGCRWrapper(FixMatch(model), GradientConsistencyLoss(model))


def _prefixed(prefix: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state_dict.items()}


OTHER_STATES: dict[str, tuple[str, Callable[[GGCRWrapper], Any], str]] = {
    "the bare model's": ("wrapper", lambda w: w.method.model.state_dict(),
        r"keys of the bare model, not those of a GGCRWrapper.*`wrapper\.method\.model\.load_state_dict"),
    "the method's": ("wrapper", lambda w: w.method.state_dict(), r"`method` alone.*`wrapper\.method\.load_state_dict"),
    "of a DDP wrapper": ("wrapper", lambda w: _prefixed("module.", w.state_dict()),
        r"start with 'module\.', as DistributedDataParallel.*removeprefix.*`wrapper\.load_state_dict"),
    "of a DDP model": ("wrapper", lambda w: _prefixed("module.", w.method.model.state_dict()),
        r"start with 'module\.', .*`wrapper\.method\.model\.load_state_dict"),
    "of a compiled wrapper": ("wrapper", lambda w: _prefixed("_orig_mod.", w.state_dict()),
        r"start with '_orig_mod\.', as torch\.compile"),
    "nothing": ("wrapper", lambda w: None, r"`state_dict` is of type NoneType: pass what `wrapper\.state_dict\(\)`"),
    "the bare model's, for a method": ("method", lambda w: w.method.model.state_dict(),
        r"keys of the bare model, not those of a FixMatch: .*`method\.model\.load_state_dict"),
    "the wrapper's, for a method": ("method", lambda w: w.state_dict(),
        r"keys of a GGCRWrapper around a FixMatch: load it into the wrapper, or"),
    "of a DDP method, for a method": ("method", lambda w: _prefixed("module.", w.method.state_dict()),
        r"start with 'module\.', .*`method\.load_state_dict"),
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", OTHER_STATES)
def test_a_state_dict_of_something_else_is_refused(case: str, strict: bool) -> None:
    """With `strict=False` too, where torch would load nothing and say nothing; and nothing is loaded."""
    into, other, match = OTHER_STATES[case]
    source, wrapper = _fixmatch(0), _fixmatch(1)
    before = copy.deepcopy(wrapper.state_dict())
    with pytest.raises(StateError, match=match):
        {"wrapper": wrapper, "method": wrapper.method}[into].load_state_dict(other(source), strict=strict)
    assert same_state(before, wrapper.state_dict())


def test_a_part_of_the_own_state_is_loaded_as_torch_does() -> None:
    wrapper = _fixmatch(0)
    kept = {key: value for key, value in wrapper.state_dict().items() if key.startswith("method.model.")}
    assert wrapper.load_state_dict(kept, strict=False).missing_keys == ["_extra_state", "method._extra_state"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*method\._extra_state"):
        wrapper.load_state_dict(kept)


def test_deepcopy_and_pickle() -> None:
    """A copy is independent, compares its own model, and continues as the original would."""
    _, wrapper = make(loss={"max_pairs": 2}, weight=0.5)
    wrapper(DATA[0])
    twin = copy.deepcopy(wrapper)
    torch.manual_seed(1)
    expected = float(wrapper(DATA[1]).loss.detach())
    torch.manual_seed(1)
    assert float(twin(DATA[1]).loss.detach()) == expected
    twin(DATA[2]).loss.backward()
    assert all(p.grad is None for p in wrapper.parameters()), "the copy's gradient went into the original"
    restored = pickle.loads(pickle.dumps(twin))
    assert restored.step == twin.step
    torch.manual_seed(2)
    a = float(restored(DATA[3]).loss.detach())
    torch.manual_seed(2)
    assert a == float(twin(DATA[3]).loss.detach())


def test_eval_mode_adds_nothing_and_counts_nothing() -> None:
    method, wrapper = make(weight=0.5)
    wrapper(DATA[0])
    wrapper.eval()
    count = training.Counter(method.model)
    base, *_ = training.plain_fixmatch(copy.deepcopy(method.model), DATA[1], THRESHOLD)
    assert float(wrapper(DATA[1]).loss.detach()) == float(base.detach())
    with torch.no_grad():
        wrapper(DATA[1])
    assert wrapper.step == 1
    assert count.calls == 2
    wrapper.train()
    wrapper(DATA[2])
    assert wrapper.step == 2


def test_an_exception_in_the_method_does_not_count_a_step() -> None:
    """A step that the caller retries is the same step."""
    model = training.network()
    fails = [True]

    def method(batch: SSLBatch) -> StepOutput:
        if fails.pop() if fails else False:
            raise ValueError("planted")
        return StepOutput(model(batch.x).sum(), None)

    wrapper = GGCRWrapper(method, GradientConsistencyLoss(model))
    with pytest.raises(ValueError, match="planted"):
        wrapper(DATA[0])
    assert wrapper.step == 0
    wrapper(DATA[0])
    assert wrapper.step == 1
    fresh = GGCRWrapper(method, GradientConsistencyLoss(model))
    fresh.load_state_dict(wrapper.state_dict())  # of a function, which has no state
    assert fresh.step == 1


# -- the user's own loop -----------------------------------------------------------------------------------------------


def test_grad_scaler() -> None:
    """Scaled by 2^10 and unscaled: the gradients of the plain run; the value of the term is that of the plain run."""
    method, wrapper = make(weight=0.5, dropout=0.0)
    twin = copy.deepcopy(wrapper)
    reference = compare.gradient_of(twin(DATA[0]).loss, twin.method)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**10), sgd(wrapper)
    scaler.scale(wrapper(DATA[0]).loss).backward()
    scaler.unscale_(optimizer)
    value = torch.cat([p.grad.reshape(-1).double() for p in method.parameters()])
    assert compare.relative(value, reference) <= 1e-6
    before = [p.detach().clone() for p in method.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


# -- observed statistics -----------------------------------------------------------------------------------------------

DOUBLE = [SSLBatch(*(v.double() if v is not None and v.is_floating_point() else v for v in batch)) for batch in DATA]


def joined(batch: SSLBatch, parts: str) -> Tensor:
    return torch.cat([getattr(batch, part) for part in parts.split()])


class Forwards(nn.Module):
    """A method that forwards the named parts of a batch together, one forward after the other.

    The first one may be in inference mode, whose tensors autograd may not save. With `own` the method has a BatchNorm
    that is no part of the compared model, before and after the model's forward.
    """

    def __init__(self, model: nn.Module, *parts: str, inference: bool = False, own: bool = False) -> None:
        super().__init__()
        self.model, self.parts, self.inference, self.own = model, parts, inference, own
        self.norm = nn.BatchNorm1d(5).to(next(model.parameters()).dtype)

    def forward(self, batch: SSLBatch) -> StepOutput:
        loss = torch.zeros([])
        for number, parts in enumerate(self.parts):
            inputs = joined(batch, parts)
            loss = loss + self.norm(inputs).square().mean() if self.own else loss
            with torch.inference_mode(self.inference and number == 0):
                output = self.model(inputs).square().mean()
            loss = loss + (0.0 if output.is_inference() else output)
            loss = loss + self.norm(inputs + 1.0).mean() if self.own else loss
        return StepOutput(loss, ViewPair(batch.weak, batch.strong, torch.arange(len(batch.weak)) % 3))


#: A method around a model, and the parts of the batch that were forwarded with the weak and with the strong views.
OBSERVED: dict[str, tuple[Callable[[nn.Module], Any], str, str]] = {
    "fixmatch": (lambda m: FixMatch(m, threshold=THRESHOLD), "x weak strong", "x weak strong"),
    "fixmatch_split": (lambda m: FixMatch(m, threshold=THRESHOLD, joint=False), "weak", "x strong"),
    "views": (lambda m: Forwards(m, "weak strong"), "weak strong", "weak strong"),
    "views_twice": (lambda m: Forwards(m, "weak strong", "weak strong"), "weak strong", "weak strong"),
    "inference": (lambda m: Forwards(m, "weak strong", "x", inference=True), "weak strong", "weak strong"),
    "inference_split": (lambda m: Forwards(m, "weak", "strong", inference=True), "weak", "strong"),
    "own_batchnorm": (lambda m: Forwards(m, "weak strong", own=True), "weak strong", "weak strong"),
}


@ENGINES
@pytest.mark.parametrize("way", OBSERVED)
def test_observed_statistics_are_those_of_each_views_own_forward(way: str, engine: str) -> None:
    """With both views differentiated and with one, in chunks of another size in turn."""
    build, weak, strong = OBSERVED[way]
    place = list(OBSERVED).index(way) + ["loop", "vmap", "ghost"].index(engine)
    model = training.network(dropout=0.0).double()
    for turn, (batch, stop) in enumerate(zip(DOUBLE, (None, "weak"), strict=False)):
        options: dict[str, Any] = {"chunk_size": (None, 1, 2)[(place + turn) % 3], "stop_gradient": stop}
        consistency = GradientConsistencyLoss(model, batchnorm="observed", engine=engine, **options)
        method = build(model)
        wrapper = GGCRWrapper(method, consistency, warmup_steps=0, weight=1.0)
        twin = copy.deepcopy(method)
        bare = compare.gradient_of(twin(batch).loss, twin.model)
        out = wrapper(batch)
        gradient = compare.gradient_of(out.loss, model) - bare
        verdict = Judge(
            model, batch.weak, batch.strong, out.pair.target, out.pair.weight, stop_gradient=stop,
            observed=joined(batch, weak), observed_strong=joined(batch, strong),
        ).verdict()  # fmt: skip
        seen = consistency.last.compared
        assert 0 < int(seen.sum()) < len(seen) + (out.pair.weight is None)
        assert compare.cosine_error(consistency.last.cosine[seen], verdict.cosine[seen]) <= 1e-10
        assert float(out.logs["ggcr_loss"]) == pytest.approx(float(verdict.loss), abs=1e-10)
        assert compare.relative(gradient, verdict.flat) <= 1e-8


def test_a_view_is_found_among_the_forwards_by_its_rows() -> None:
    """Views with NaN in a pair, mappings, several tensors; and what cannot be told is refused."""
    model = Sum()
    first, second = torch.randn(5, 3), torch.randn(4, 3)
    first[1, 0] = torch.nan
    with Observer(model) as observer:
        model(torch.cat([second, first]), b=torch.zeros(9, 3))
        model(second + 1.0, b=torch.ones(4, 3))
    zeros, ones = torch.zeros(5, 3), torch.ones(4, 3)
    weak, strong = observer.observed(ViewPair({"a": first, "b": zeros}, [second + 1.0, ones], torch.zeros(5)))
    assert (weak[0].rows, strong[0].rows) == (9, 4)
    for view in ({"a": first.flip(0), "b": zeros}, {"a": first, "b": zeros + 1.0}, first):
        with pytest.raises(ConfigError, match="Of 2 in this step, 0 held the weak views"):
            observer.observed(ViewPair(view, [second + 1.0, ones], torch.zeros(5)))


def test_a_forward_with_other_constants_is_not_the_views() -> None:
    """A flag may send the model another way, with other statistics: the view must hold what the forward was given."""
    model = Flagged()
    x = torch.randn(5, 3)
    with Observer(model) as observer:
        model(x, None, shift=True)
    view = {"x": x, "mask": None, "shift": True}
    assert observer.observed(ViewPair(view, view, torch.zeros(5)))[0].rows == 5
    for other in (x, {**view, "shift": 1}, {**view, "shift": False}, {**view, "mask": 0.0}, [x, None]):
        with pytest.raises(ConfigError, match=r"same constants .*Of 1 in this step, 0 held the weak views"):
            observer.observed(ViewPair(other, view, torch.zeros(5)))


#: What a method forwards, and words of the refusal; with one view alone as Mean Teacher and pseudo-labelling do.
UNTOLD = {
    "nothing": ((), "Of 0 in this step, 0 held the weak views"),
    "twice": (("weak strong", "x weak strong"), "Of 2 in this step, 2 held the weak views"),
    "weak": (("x weak",), "Of 1 in this step, 0 held the strong views"),
    "strong": (("x strong",), "Of 1 in this step, 0 held the weak views"),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_observing_needs_one_forward_of_each_view(name: str) -> None:
    parts, words = UNTOLD[name]
    model = training.network(dropout=0.0)
    wrapper = GGCRWrapper(Forwards(model, *parts), GradientConsistencyLoss(model, batchnorm="observed"), warmup_steps=0)
    with pytest.raises(ConfigError, match=words):
        wrapper(DATA[0])
    assert wrapper.step == 0


@ENGINES
def test_observed_statistics_of_one_pair(engine: str) -> None:
    """A forward of as many samples as the engine's own: the statistics are constants all the same."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).double()
    weak, strong = torch.randn(1, 1, 5, 5).double(), torch.randn(1, 1, 5, 5).double()
    consistency = GradientConsistencyLoss(model, batchnorm="observed", engine=engine)
    batch = SSLBatch(weak[:0], torch.zeros(0, dtype=torch.long), weak, strong)
    out = GGCRWrapper(Forwards(model, "weak", "x strong"), consistency, warmup_steps=0)(batch)
    verdict = Judge(model, weak, strong, out.pair.target, observed=weak, observed_strong=strong).verdict()
    assert compare.cosine_error(consistency.last.cosine, verdict.cosine) <= 1e-10


class Flagged(nn.Module):
    """A BatchNorm on one of two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, mask: None = None, *, shift: bool) -> Tensor:
        return self.norm(x + 1.0 if shift else x)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.norm(a + b)


def _rows(net: nn.Module, x: Tensor) -> Tensor:
    """A BatchNorm of samples behind a convolution whose weight is standardised by `F.batch_norm`, as timm does."""
    weight = F.batch_norm(net.conv.weight.flatten(1), None, None, training=True).view_as(net.conv.weight)
    return net.norm(F.conv2d(x, weight, net.conv.bias)).mean((2, 3))


def _sometimes(net: nn.Module, x: Tensor) -> Tensor:
    return net.norm(x) if len(x) == 4 else net.norm(net.norm(x))


#: A model, the shapes of x and of the views, and what is said of calls that cannot be told apart.
CALLS = [
    (Layers(_rows, conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4)), (0, 1, 5, 5), (1, 1, 5, 5), ConfigError,
        "found a forward of one sample with a BatchNorm call on several"),
    (Layers(_sometimes, norm=nn.BatchNorm1d(3)), (2, 3), (4, 3), UnsupportedModuleError,
        "1 with the weak views and 2 with the strong ones"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "labeled", "unlabeled", "error", "match"), CALLS, ids=["rows", "sometimes"])
def test_batchnorm_calls_that_cannot_be_told_are_refused(
    model: nn.Module, labeled: tuple[int, ...], unlabeled: tuple[int, ...], error: type[Exception], match: str
) -> None:
    method = Forwards(model, "weak", "x strong")
    wrapper = GGCRWrapper(method, GradientConsistencyLoss(method.model, batchnorm="observed"), warmup_steps=0)
    batch = SSLBatch(torch.randn(labeled), torch.arange(labeled[0]), torch.randn(unlabeled), torch.randn(unlabeled))
    with pytest.raises(error, match=match):
        wrapper(batch)


def test_an_engine_that_does_not_tell_the_view_is_refused() -> None:
    class Untold(LoopEngine):
        def products(self, problem: Problem) -> GradProducts:
            losses = problem.losses
            return super().products(replace(problem, losses=lambda *args, view: losses(*args)))

    model = training.network(dropout=0.0)
    consistency = GradientConsistencyLoss(model, batchnorm="observed", engine=Untold())
    with pytest.raises(ConfigError, match="the engine does not say which view a sample is: pass `view`"):
        GGCRWrapper(Forwards(model, "weak", "x strong"), consistency, warmup_steps=0)(DATA[0])
    one = Forwards(model, "weak strong")  # with one forward there is nothing to tell
    assert GGCRWrapper(one, consistency, warmup_steps=0)(DATA[0]).loss.isfinite()


def test_observing_leaves_no_trace() -> None:
    """Hooks, attributes, flags and random state after an observed step are those after an ordinary one."""
    snapshots = []
    for option in ("auto", "observed"):
        method, wrapper = make(loss={"batchnorm": option}, weight=0.5)
        torch.manual_seed(4)
        before = state.snapshot(method)
        wrapper(DATA[0])
        changed = state.differences(before, state.snapshot(method))
        snapshots.append((changed, [state.digest(v) for v in method.state_dict().values()]))
    assert snapshots[0] == snapshots[1]


@pytest.mark.parametrize("planted", [ValueError("planted"), KeyboardInterrupt("planted")], ids=["error", "interrupt"])
def test_an_exception_while_observing_leaves_no_trace(planted: BaseException) -> None:
    model = training.network()

    def method(batch: SSLBatch) -> StepOutput:
        model(batch.weak)
        raise planted

    wrapper = GGCRWrapper(method, GradientConsistencyLoss(model, batchnorm="observed"), warmup_steps=0)
    model(DATA[0].weak)
    before = state.snapshot(model)
    with pytest.raises(type(planted), match="planted"):
        wrapper(DATA[0])
    changed = state.differences(before, state.snapshot(model))
    own = ("running_mean: buffer", "running_var: buffer", "num_batches_tracked: buffer", "random state", "state_dict")
    assert [key for key in changed if not key.endswith(own)] == [], "beyond what the method's own forward does"


# -- what is no method -------------------------------------------------------------------------------------------------


def test_bad_method_and_consistency() -> None:
    model = training.network()
    with pytest.raises(GradConsistError, match="method"):
        GGCRWrapper(3, GradientConsistencyLoss(model))
    with pytest.raises(GradConsistError, match="consistency"):
        GGCRWrapper(lambda batch: None, model)
