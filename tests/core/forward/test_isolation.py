"""What goes on around a comparison: threads, calls inside calls, transforms, compiled code, checkpoints."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist._forward.isolation import one_comparison
from gradconsist.errors import GradModeError, ParameterSelectionError, UnsupportedModuleError
from gradconsist.methods import FixMatch
from support import compare, state
from support.models import Layers
from support.nets import assert_exact, net, views
from support.oracle import judge
from support.threads import delicate, in_threads, work

DOUBLE = torch.float64
ENGINES = pytest.mark.parametrize("engine", ["auto", "loop", "vmap", "ghost"])
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])

pytestmark = [  # of torch.compile itself
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "rounds"), [("auto", 30), ("loop", 8), ("vmap", 8), ("ghost", 8)])
def test_two_models_in_two_threads(engine: str, rounds: int) -> None:
    models = [delicate(0), delicate(1)]
    before = state.snapshot(models[0])
    assert in_threads([work(model, engine=engine) for model in models], rounds) == (0, [])
    assert state.differences(before, state.snapshot(models[0])) == []


@FUSED
@ENGINES
def test_one_model_in_two_threads(engine: str, fused: bool) -> None:
    """Without the lock, each thread sees the other's stand-ins for the parameters, and modes stay changed for good."""
    model = delicate(0)
    before = state.snapshot(model)
    assert in_threads([work(model, engine=engine, fused=fused) for _ in range(2)], 6) == (0, [])
    assert state.differences(before, state.snapshot(model)) == []


def test_one_loss_in_two_threads_and_measure_beside_it() -> None:
    model = delicate(0)
    gc, parameters = GradientConsistencyLoss(model, max_pairs=None), list(model.parameters())
    works: list[Callable[[], Tensor]] = [
        lambda: torch.autograd.grad(gc(*views()), parameters)[0],
        lambda: gc.measure(*views()).cosine,
        lambda: torch.autograd.grad(gc(*views()), parameters)[-1],
    ]
    assert in_threads(works, 10) == (0, [])


def test_threads_wait_for_each_other_and_not_for_ever() -> None:
    """A comparison that fails lets the next one in."""
    model = delicate(0)
    gc = GradientConsistencyLoss(model, loss_fn=lambda z, t: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division"):
        gc(*views())
    done = threading.Event()

    def other() -> None:
        GradientConsistencyLoss(delicate(1))(*views())
        done.set()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    assert done.wait(60)
    thread.join()


def test_random_numbers_of_another_thread_are_an_error_and_not_a_result() -> None:
    model = delicate(0)

    def meanwhile(z: Tensor, t: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: (torch.rand(1), random.random()))
        thread.start()
        thread.join()
        return F.cross_entropy(z, t, reduction="none")

    with pytest.raises(UnsupportedModuleError, match=r"random numbers.*another thread.*wait"):
        GradientConsistencyLoss(model, engine="loop", loss_fn=meanwhile)(*views())


# -- calls inside calls, and inside transforms -------------------------------------------------------------------------


@ENGINES
@pytest.mark.parametrize("what", ["loss", "measure", "another model"])
def test_a_loss_inside_a_comparison_is_refused(what: str, engine: str) -> None:
    model = net()
    inner = GradientConsistencyLoss(net(seed=1) if what == "another model" else model, engine=engine)

    def loss_fn(z: Tensor, t: Tensor) -> Tensor:
        extra = inner.measure(*views()).cosine.sum() if what == "measure" else inner(*views())
        return F.cross_entropy(z, t, reduction="none") + extra

    gc = GradientConsistencyLoss(model, engine=engine, loss_fn=loss_fn)
    before = state.snapshot(model)
    for call in (gc, gc.measure):
        with pytest.raises(GradModeError, match=r"inside a comparison.*add the two losses|no_grad"):
            call(*views())
    assert state.differences(before, state.snapshot(model)) == []
    inner(*views())  # and is free again


def test_a_loss_inside_a_hook_is_refused() -> None:
    model = net()
    inner = GradientConsistencyLoss(model)
    model.stem.register_forward_hook(lambda *_: inner.measure(*views()) and None)
    with pytest.raises(GradModeError, match="inside a comparison"):
        GradientConsistencyLoss(model)(*views())


def _step(gc: GradientConsistencyLoss) -> nn.Module:
    """A step whose parameters are the model's."""
    return Layers(lambda _: gc(*views()), model=gc.model)


@FUSED
@ENGINES
def test_inside_functional_call_it_is_the_loss_of_those_parameters(engine: str, fused: bool) -> None:
    """As meta-learning does: the gradient reaches what was put in place of the parameters, and what they come from."""
    model = net()
    step = _step(GradientConsistencyLoss(model, engine=engine, fused=fused))
    sources = {f"model.{name}": p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = functional_call(step, {name: 0.9 * source for name, source in sources.items()}, ())
    parts = torch.autograd.grad(loss, list(sources.values()), allow_unused=True, materialize_grads=True)
    found = torch.cat([g.flatten() for g in parts])
    twin = net()
    twin.load_state_dict({name.removeprefix("model."): 0.9 * source for name, source in sources.items()})
    assert compare.relative(found, 0.9 * judge(twin, *views()).flat) <= 1e-8
    assert all(p.grad is None for p in model.parameters())


def _transforms(gc: GradientConsistencyLoss) -> dict[str, Callable[[], Any]]:
    weak, strong, target = views()
    step, parameters = _step(gc), {f"model.{n}": p.detach() for n, p in gc.model.named_parameters()}

    def forward_mode() -> Tensor:
        with forward_ad.dual_level():
            return gc(forward_ad.make_dual(weak, torch.ones_like(weak)), strong, target)

    return {
        "vmap": lambda: vmap(lambda x: gc(x, strong, target))(weak[None]),
        "vmap of measure": lambda: vmap(lambda x: gc.measure(x, strong, target).cosine)(weak[None]),
        "grad": lambda: grad(lambda p: functional_call(step, p, ()))(parameters),
        "grad of measure": lambda: grad(lambda x: gc.measure(x, strong, target).cosine.sum())(weak),
        "jvp": lambda: jvp(lambda x: gc(x, strong, target), (weak,), (weak,)),
        "forward mode": forward_mode,
    }


@FUSED
@ENGINES
def test_inside_a_transform_it_is_refused(engine: str, fused: bool) -> None:
    """Forward mode, for one, would get no derivative from the fused form, in silence."""
    model = net()
    for name, call in _transforms(GradientConsistencyLoss(model, engine=engine, fused=fused)).items():
        with pytest.raises(GradModeError, match=r"inside a transform.*call it outside"):
            pytest.fail(f"{name} gave {call()}")


# -- compiled code -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """torch.compile without a code generator, its caches left empty."""
    torch._dynamo.reset()
    yield lambda function, backend="aot_eager": torch.compile(function, backend=backend)
    torch._dynamo.reset()


COMPILED = [
    ("eager", "vmap", True),
    ("aot_eager", "loop", True),
    ("aot_eager", "loop", False),
    ("aot_eager", "auto", True),
]


@pytest.mark.parametrize(("backend", "engine", "fused"), COMPILED)
def test_a_compiled_function_inside_a_model_runs_as_python(
    compiled: Callable[..., Any], backend: str, engine: str, fused: bool
) -> None:
    """Compiled, it has no second derivative, or one that Dynamo traced through our own functions."""
    activation = compiled(lambda x: 2 * torch.tanh(x), backend)
    model = net(lambda net, x: activation(net.stem(x)))
    reference = net(lambda net, x: 2 * torch.tanh(net.stem(x)))
    model(views()[0]).sum().backward()  # the user's own forward is compiled
    model.zero_grad(set_to_none=True)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_exact(model, engine, reference, fused=fused)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted, "we compile nothing"


@ENGINES
def test_a_compiled_forward_and_a_compiled_loss(compiled: Callable[..., Any], engine: str) -> None:
    model = net()
    model.stem.forward = compiled(model.stem.forward)  # type: ignore[method-assign]
    loss_fn = compiled(lambda z, t: F.cross_entropy(z, t, reduction="none"))
    assert_exact(model, engine, net(), loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("where", "engine"),
    [
        *(("model", engine) for engine in ("auto", "vmap")),
        *(("part", engine) for engine in ("loop", "ghost")),
        *(("model in place", engine) for engine in ("loop", "ghost")),
        *(("part in place", engine) for engine in ("auto", "vmap")),
    ],
)
def test_a_compiled_module_is_taken_as_it_comes(compiled: Callable[..., Any], engine: str, where: str) -> None:
    """The comparison runs the Python below it; the user's own forward stays compiled, and is compiled once."""
    plain, own = net(), net()
    if where == "part":
        own.stem = compiled(own.stem)
    elif where.endswith("in place"):
        (own if where.startswith("model") else own.stem).compile(backend="aot_eager")
    model: Any = compiled(own) if where == "model" else own
    model(views()[0]).sum().backward()
    model.zero_grad(set_to_none=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    verdict = judge(plain, *views(), compared=lambda name: name.startswith("stem."))
    for stem in (model.stem, lambda name: "stem." in name):
        gc = GradientConsistencyLoss(model, encoder=stem, engine=engine)
        compare.assert_exact(gc, views(), verdict)
        assert gc.model is model
    model(views()[0]).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_names_of_a_compiled_module(compiled: Callable[..., Any]) -> None:
    model = compiled(net())
    by_prefix = GradientConsistencyLoss(model, encoder=lambda name: name.startswith("_orig_mod.stem."))
    by_name = GradientConsistencyLoss(model, encoder=lambda name: name.startswith("stem."))
    assert by_prefix.measure(*views()).cosine.equal(by_name.measure(*views()).cosine)
    with pytest.raises(ParameterSelectionError, match=r"'_orig_mod\.stem\.weight' and 'stem\.weight'.*pass modules"):
        GradientConsistencyLoss(model, encoder=lambda name: not name.startswith("stem."))


@pytest.mark.parametrize(("engine", "fused"), [("auto", True), ("loop", False)])
def test_inside_a_compiled_step_it_runs_as_python(compiled: Callable[..., Any], engine: str, fused: bool) -> None:
    model = net()
    gc = GradientConsistencyLoss(model, engine=engine, fused=fused)
    pairs = views()  # outside: the compiler of torch 2.6 warns of generators
    verdict = judge(model, *pairs)
    step = compiled(lambda: 3.0 * gc(*pairs))
    assert compare.relative(compare.gradient_of(step(), model), 3.0 * verdict.flat) <= 1e-8
    measured = compiled(lambda: 1.0 * gc.measure(*pairs).cosine)
    assert compare.cosine_error(measured(), verdict.cosine) <= 1e-10
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(3):
        step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "compiled once"


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _again(net: Any, x: Tensor) -> Tensor:
    return checkpoint(net.middle, net.stem(x), use_reentrant=False)


def _functional(net: Any, x: Tensor) -> Tensor:
    return checkpoint(
        lambda y: net.middle(F.dropout(torch.tanh(y), 0.5, net.training)), net.stem(x), use_reentrant=False
    )


def _sequential(net: Any, x: Tensor) -> Tensor:
    return checkpoint_sequential(net.middle, 2, net.stem(x), use_reentrant=False)


def _square() -> nn.Linear:
    return nn.Linear(6, 6)


MIDDLES: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module]]] = {
    "linear": (_again, lambda: nn.Sequential(_square(), nn.Tanh())),
    "dropout": (_again, lambda: nn.Sequential(_square(), nn.Tanh(), nn.Dropout(0.5), _square())),
    "functional dropout": (_functional, lambda: nn.Sequential(_square(), nn.Tanh())),
    "batchnorm": (_again, lambda: nn.Sequential(_square(), nn.BatchNorm1d(6), nn.Softplus(), _square())),
    "layernorm": (_again, lambda: nn.Sequential(nn.LayerNorm(6), nn.GELU(), _square())),
    "attention": (_again, lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True)),
    "sequential": (_sequential, lambda: nn.Sequential(_square(), nn.Tanh(), nn.BatchNorm1d(6), _square())),
}


@ENGINES
@pytest.mark.parametrize("name", MIDDLES)
def test_a_checkpointed_part_follows_the_rules_of_the_comparison(name: str, engine: str) -> None:
    """Computed again in the backward it would not: statistics, masks and formulas are of the forward."""
    fused = engine == "auto" or (engine == "loop" and list(MIDDLES).index(name) % 2 == 0)
    function, middle = MIDDLES[name]

    def attend(net: Any, x: Tensor) -> Tensor:
        return function(net, x) if name != "attention" else checkpoint(
            lambda y: net.middle(y[:, None])[:, 0], net.stem(x), use_reentrant=False
        )  # fmt: skip

    def plain(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x)
        y = torch.tanh(y) if name == "functional dropout" else y
        return net.middle(y[:, None])[:, 0] if name == "attention" else net.middle(y)

    assert_exact(net(attend, middle=middle()), engine, net(plain, middle=middle()), fused=fused)


def test_checkpoints_work_as_before_after_a_call() -> None:
    model = net(_again, middle=nn.Sequential(_square(), nn.BatchNorm1d(6), nn.Dropout(0.4)))
    names = [name for name in vars(torch.utils.checkpoint) if name.startswith("_checkpoint_without")]
    assert names, "what is replaced has another name in this torch"
    before = [getattr(torch.utils.checkpoint, name) for name in names]
    calls = 0

    def explode(z: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert [getattr(torch.utils.checkpoint, name) for name in names] != before, "replaced meanwhile"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        GradientConsistencyLoss(model, loss_fn=explode)(*views())
        pytest.fail("not reached")
    assert calls == 1
    assert [getattr(torch.utils.checkpoint, name) for name in names] == before
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.middle.register_forward_pre_hook(count)
    model(views()[0]).sum().backward()
    assert runs == 2, "once, and again in the backward"


def test_a_checkpoint_that_runs_twice_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a torch where what is replaced has another name."""
    monkeypatch.setattr("gradconsist._forward.isolation._CHECKPOINTS", ())
    model = net(_again, middle=nn.Sequential(_square(), nn.LayerNorm(6), nn.Tanh()))
    with pytest.raises(UnsupportedModuleError, match=r"checkpointed part.*use_reentrant=False"):
        GradientConsistencyLoss(model, engine="loop")(*views())


def test_two_comparisons_do_not_overlap() -> None:
    order: list[str] = []

    def other() -> None:
        with one_comparison():
            order.append("second")

    with one_comparison():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def _parametrized() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    parametrizations.weight_norm(model[0])
    parametrizations.weight_norm(model[2])
    return model


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_cached_parametrizations_change_nothing(engine: str, filled: bool) -> None:
    """Not L_g, whose forwards use stand-ins, and not the user's next forward, which takes what is in the cache."""
    x, target = torch.randn(4, 5).double(), torch.arange(4) % 3
    found = []
    for cached in (False, True):
        model = _parametrized()
        with parametrize.cached() if cached else nullcontext():
            if filled:
                model(x)
            loss = GradientConsistencyLoss(model, engine=engine)(x, x + 0.3, target)
            loss = loss + model(x).square().sum()
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("share", ["auto", False])
@pytest.mark.parametrize("joint", [True, False])
def test_cached_parametrizations_change_no_step(share: Any, joint: bool) -> None:
    x, y = torch.randn(4, 5).double(), torch.arange(4) % 3
    found = []
    for cached in (False, True):
        model = _parametrized()
        method, term = FixMatch(model, threshold=0.2, joint=joint), GradientConsistencyLoss(model)
        wrapper = GGCRWrapper(method, term, warmup_steps=0, share=share)
        with parametrize.cached() if cached else nullcontext():
            loss = wrapper(SSLBatch(x, y, x, x + 0.3)).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
