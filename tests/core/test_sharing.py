"""One pass for both losses: the shared step against the ordinary one, where it is refused, and `with_losses`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, StepOutput
from gradconsist.engines import GradProducts, LoopEngine, Problem
from gradconsist.errors import ConfigError
from gradconsist.methods import UDA, FixMatch, FlexMatch, FreeMatch, PseudoLabel, SoftMatch
from support import methods, models
from support.methods import CLASSES, SAMPLES, same_state

# Every method that qualifies, with masks that are partly 0 or soft weights on the data below.
SHARING: dict[str, Callable[[nn.Module], Any]] = {
    "fixmatch": lambda model: FixMatch(model, threshold=0.45, brier_weight=0.3, unlabeled_ramp_steps=4),
    "fixmatch, split": lambda model: FixMatch(model, threshold=0.45, unlabeled_weight=0.7, joint=False),
    "flexmatch": lambda model: FlexMatch(model, samples=SAMPLES, threshold=0.6, threshold_warmup=False),
    "freematch": lambda model: FreeMatch(model, classes=CLASSES, ema_decay=0.7, fairness_weight=0.0),
    "softmatch": lambda model: SoftMatch(model, classes=CLASSES, ema_decay=0.7),
    "uda": lambda model: UDA(model, threshold=0.45, annealing="linear", annealing_steps=6),
}


class Normalised(nn.Module):
    """Layers with LayerNorm, and more of the options of a module that a test needs."""

    def __init__(self, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.norm, self.hidden = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.extra = nn.Identity() if extra is None else extra
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.extra(torch.tanh(self.norm(self.stem(x))))
        return 2 * self.head(torch.tanh(self.hidden(x)))


def conv() -> nn.Module:
    """A convolution with GroupNorm."""
    return models.Layers(
        lambda net, x: 2 * net.head(torch.tanh(net.norm(net.stem(x[:, None]))).flatten(1)),
        stem=nn.Conv1d(1, 4, 3), norm=nn.GroupNorm(2, 4), head=nn.Linear(12, CLASSES),
    )  # fmt: skip


def text() -> nn.Module:
    """Takes words and a mask by keyword, beside a constant, and returns an object with logits."""

    def forward(net: nn.Module, *, ids: Tensor, mask: Tensor, pooling: str) -> models.Output:
        assert pooling == "mean"
        x = torch.tanh(net.norm(net.words(ids))) * mask[..., None]
        return models.Output(2 * net.head(x.sum(1) / mask.sum(1, keepdim=True)))

    return models.Layers(forward, words=nn.Embedding(11, 8), norm=nn.LayerNorm(8), head=nn.Linear(8, CLASSES))


def words(step: int) -> SSLBatch:
    generator = torch.Generator().manual_seed(step)

    def view(count: int) -> dict[str, Any]:
        mask = (torch.rand(count, 6, generator=generator) < 0.8).double()
        mask[:, 0] = 1
        return {"ids": torch.randint(11, (count, 6), generator=generator), "mask": mask, "pooling": "mean"}

    return SSLBatch(view(4), torch.randint(CLASSES, (4,), generator=generator), view(9), view(9))


def build(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind().double()


def run(
    model: nn.Module,
    method: Callable[[nn.Module], Any],
    batches: list[SSLBatch],
    *,
    loss: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[GGCRWrapper, list[StepOutput], list[list[Tensor]]]:
    """Trains a copy of `model`; the wrapper, its outputs and the gradients of all steps."""
    torch.manual_seed(5)
    twin = copy.deepcopy(model)
    term = GradientConsistencyLoss(twin, **{"chunk_size": 4, **(loss or {})})
    wrapper = GGCRWrapper(method(twin), term, **{"warmup_steps": 0, "weight": 0.3, **options})
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    outputs, gradients = [], []
    for batch in batches:
        optimizer.zero_grad()
        out = wrapper(batch)
        out.loss.backward()
        optimizer.step()
        outputs.append(out)
        gradients.append([parameter.grad.clone() for parameter in twin.parameters() if parameter.requires_grad])
    return wrapper, outputs, gradients


def assert_same_steps(first: Any, second: Any, tolerance: float = 1e-11) -> None:
    """Losses, all gradients, the state of method and model, and the logs."""
    for one, two in zip(first[1], second[1], strict=True):
        assert list(one.logs) == list(two.logs)
        for name, value in {**one.logs, "loss": one.loss.detach()}.items():
            other = two.loss.detach() if name == "loss" else two.logs[name]
            assert float(value) == pytest.approx(float(other), abs=tolerance, nan_ok=True), name
    for ours, theirs in zip(first[2], second[2], strict=True):
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=tolerance)
    for (name, one), two in zip(
        first[0].method.state_dict().items(), second[0].method.state_dict().values(), strict=True
    ):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, two, rtol=0, atol=tolerance, msg=name)
        else:
            assert one == two


ENGINES = [("ghost", True), ("ghost", False), ("vmap", True), ("loop", True), ("loop", False)]
# The ghost engine for each method, and two of the others in turn.
TURNS = [
    (name, *ENGINES[way])
    for place, name in enumerate(SHARING)
    for way in (0, 1 + place % 4, 1 + (place + 1) % 4)
]  # fmt: skip


@pytest.mark.parametrize(("name", "engine", "fused"), TURNS)
def test_every_method_takes_the_same_steps(name: str, engine: str, fused: bool) -> None:
    model, batches = build(Normalised), methods.data(4)
    loss = {"engine": engine, "fused": fused, "encoder": lambda name: "head" not in name}
    ordinary = run(model, SHARING[name], batches, loss=loss, share=False)
    shared = run(model, SHARING[name], batches, loss=loss)
    assert shared[0].unshared is None
    rates = [float(out.logs["mask_rate"]) for out in shared[1]]
    assert any(0 < rate < 1 for rate in rates), "some pairs count less than others"
    assert_same_steps(ordinary, shared)


@pytest.mark.parametrize(
    ("kind", "batches"), [(conv, methods.data(3)), (text, [words(step) for step in range(3)])], ids=["conv", "text"]
)
def test_other_models_take_the_same_steps(kind: Callable[[], nn.Module], batches: list[SSLBatch]) -> None:
    model = build(kind)
    for method in (SHARING["fixmatch"], SHARING["uda"]):
        ordinary, shared = (run(model, method, batches, share=share) for share in (False, True))
        assert_same_steps(ordinary, shared)


OPTIONS = {
    "gate all": {"gate": "all"},
    "every second step": {"every": 2},
    "warm-up and ramp": {"warmup_steps": 2, "ramp_steps": 3},
    "sum": {"loss": {"reduction": "sum"}},
    "weak constant": {"loss": {"stop_gradient": "weak"}},
    "all degenerate": {"loss": {"min_norm": 1e6}},
    "nothing passes": {"method": lambda model: FixMatch(model, threshold=1.0)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_term_do_not_change_the_unlabeled_loss(name: str) -> None:
    options = dict(OPTIONS[name])
    method = options.pop("method", SHARING["fixmatch"])
    model, batches = build(Normalised), methods.data(4)
    ordinary, shared = (run(model, method, batches, share=share, **options) for share in (False, True))
    assert_same_steps(ordinary, shared)


def test_the_method_forwards_no_strong_views() -> None:
    seen: list[int] = []

    class Watched(Normalised):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    model, batches = build(Watched), methods.data(2)
    run(model, SHARING["fixmatch"], batches[:1], share=False)
    assert seen[0] == 4 + 9 + 9
    wrapper, _, _ = run(model, SHARING["fixmatch"], batches, share=True)
    seen.clear()
    wrapper(batches[0])
    assert seen[:2] == [4, 9]
    assert set(seen[2:]) == {1}, "the comparison's, sample by sample under vmap"


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"warmup_steps": 9}, {"every": 9, "warmup_steps": 1}])
def test_a_step_without_the_term_is_bitwise_the_method(options: dict[str, Any]) -> None:
    model, batches = build(Normalised), methods.data(3)
    _, outputs, gradients = run(model, SHARING["softmatch"], batches[:1], share=True, **options)
    twin = copy.deepcopy(model)
    plain = SHARING["softmatch"](twin)
    out = plain(batches[0])
    out.loss.backward()
    assert torch.equal(out.loss, outputs[0].loss)
    assert all(torch.equal(p.grad, g) for p, g in zip(twin.parameters(), gradients[0], strict=True))
    assert outputs[0].logs["loss_unsupervised"] == out.logs["loss_unsupervised"]


def test_a_resumed_run_continues_bitwise() -> None:
    model, batches = build(Normalised), methods.data(6)
    straight = run(model, SHARING["flexmatch"], batches, share=True)
    first, outputs, _ = run(model, SHARING["flexmatch"], batches[:3], share=True)
    assert all(torch.equal(one.loss, two.loss) for one, two in zip(straight[1], outputs, strict=False))
    twin = copy.deepcopy(model)
    second = GGCRWrapper(
        SHARING["flexmatch"](twin), GradientConsistencyLoss(twin, chunk_size=4), warmup_steps=0, weight=0.3
    )
    second.load_state_dict(first.state_dict())
    out, expected = second(batches[3]), first(batches[3])
    assert torch.equal(out.loss, expected.loss)
    assert same_state(dict(second.state_dict()), dict(first.state_dict()))
    ours, theirs = (
        torch.autograd.grad(each.loss, list(wrapper.parameters()))
        for each, wrapper in ((out, second), (expected, first))
    )
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


# -- where it is refused -----------------------------------------------------------------------------------------------


def draws() -> nn.Module:
    """Noise in train mode, from a module that has a parameter, so that nothing switches it off."""
    return models.Layers(lambda m, x: F.dropout(m.norm(x), 0.5, m.training), norm=nn.LayerNorm(8))


def doubles() -> nn.Module:
    """Something else in train mode, without chance."""
    return models.Layers(lambda m, x: 2 * x if m.training else x)


class Masked(Normalised):
    """A class that is masked out by a large number, which no difference of the others comes near."""

    def __init__(self) -> None:
        super().__init__(doubles())

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.cat([logits[:, :-1], torch.full_like(logits[:, -1:], -1e9)], 1)


class Remembers(nn.Module):
    """A running mean that is not a BatchNorm's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean += 0.1 * x.detach().mean(0)
        return x


class Counts(nn.Module):
    """Its scale grows with every forward in train mode."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x * (1 + 0.1 * self.calls)


class Switched(nn.Module):
    """A dropout that an attribute switches on, of whatever kind `off` is."""

    def __init__(self, off: Any) -> None:
        super().__init__()
        self.rates = off

    def forward(self, x: Tensor) -> Tensor:
        on = self.rates["on"] if isinstance(self.rates, dict) else self.rates
        return F.dropout(x, 0.5, self.training) if on else x


class Silent:
    """An engine of a user's, which knows no losses."""

    def products(self, problem: Problem) -> GradProducts:
        return LoopEngine().products(problem)


class Own(FixMatch):
    """A subclass, whose unlabeled loss may be another one."""


def hooked() -> nn.Module:
    model = Normalised()
    model.hidden.register_forward_hook(lambda *_: None)
    return model


def layer(extra: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Normalised(extra())


#: (model, method, options of the wrapper and the loss), and words of the reason.
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "dropout": (layer(lambda: nn.Dropout(0.5)), None, {}, "draws random numbers"),
    "dropout of a layer with parameters": (layer(draws), None, {}, "draws random numbers"),
    "another mode": (layer(doubles), None, {}, "other logits in the comparison"),
    "beside a masked class": (Masked, None, {}, "returns other logits in the comparison"),
    "a buffer": (layer(Remembers), None, {}, "changes its buffers"),
    "counter": (layer(Counts), None, {}, "changes its attributes"),
    "hooks": (hooked, None, {}, r"`method.model.hidden` has hooks"),
    "half": (Normalised, None, {"half": True}, "float16"),
    "max_pairs": (Normalised, None, {"loss": {"max_pairs": 3}}, "max_pairs=3"),
    "strong constant": (Normalised, None, {"loss": {"stop_gradient": "strong"}}, "without a graph"),
    "statistics": (methods.network, None, {"loss": {"through_statistics": True}}, "through_statistics=True"),
    "engine": (Normalised, None, {"loss": {"engine": Silent()}}, "gives_losses"),
    "loss_fn": (
        Normalised, None, {"loss": {"loss_fn": lambda z, t: F.cross_entropy(z, t, reduction="none")}}, "`loss_fn`",
    ),
    "logits_fn": (Normalised, lambda m: FixMatch(m, logits_fn=lambda z: z), {}, "logits_fn"),
    "pair_fn": (Normalised, None, {"pair_fn": lambda args, kwargs, out: out.pair}, "pair_fn"),
    "subclass": (Normalised, Own, {}, "loss of Own is not known"),
    "fairness": (Normalised, lambda m: FreeMatch(m, classes=CLASSES), {}, "fairness_weight"),
    "one view": (Normalised, PseudoLabel, {}, "is a PseudoLabel, whose unlabeled loss the wrapper does not know"),
    "a model in front": (
        Normalised, lambda m: FixMatch(nn.Sequential(nn.Identity(), m)), {}, "another module than `method.model`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_step_is_not_shared(name: str) -> None:
    kind, method, options, reason = REFUSED[name]
    options, method = dict(options), method or (lambda m: FixMatch(m, threshold=0.4))
    model, batches = build(kind), methods.data(1)
    if options.pop("half", False):
        model.spare = nn.Parameter(torch.zeros(1, dtype=torch.float16), requires_grad=False)
    ordinary = run(model, method, batches, share=False, **options)
    automatic = run(model, method, batches, **options)
    assert reason.replace("\\", "") in automatic[0].unshared
    assert torch.equal(ordinary[1][0].loss, automatic[1][0].loss)
    assert all(torch.equal(a, b) for a, b in zip(ordinary[2][0], automatic[2][0], strict=True))
    with pytest.raises(ConfigError, match=f"`share=True` is impossible: .*{reason}"):
        run(model, method, batches, share=True, **options)
    with pytest.raises(ConfigError, match=f"`share=True` is impossible: .*{reason}"):  # not after the warm-up only
        run(model, method, batches, share=True, **{**options, "warmup_steps": 100})


def acting() -> nn.Module:
    """A layer with a function among its attributes, and options in an object of another library's."""
    own = models.Layers(lambda m, x: F.dropout(F.relu(x), m.options.noise, m.training))
    own.options = SimpleNamespace(noise=0.0)
    return own


#: A layer, and what is done to it after the first step.
TURNED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None]]] = {
    "flag": (lambda: Switched(False), lambda own: setattr(own, "rates", True)),
    "number": (lambda: Switched(0), lambda own: setattr(own, "rates", 1)),
    "list": (lambda: Switched([]), lambda own: setattr(own, "rates", [0.5])),
    "dict": (lambda: Switched({"on": 0, "kind": nn.Dropout}), lambda own: own.rates.update(on=1)),
    "function": (acting, lambda own: setattr(own, "function", lambda _, x: F.dropout(x, 0.5))),
    "options": (acting, lambda own: setattr(own.options, "noise", 0.5)),
    "probability": (lambda: nn.Dropout(0.0), lambda own: setattr(own, "p", 0.5)),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_switch_that_is_turned_later_is_noticed(name: str) -> None:
    own, turn = TURNED[name]
    model, batches = build(layer(own)), methods.data(2)
    wrapper = GGCRWrapper(FixMatch(model, threshold=0.4), GradientConsistencyLoss(model), warmup_steps=0)
    wrapper(batches[0])
    assert wrapper.unshared is None
    turn(model.extra)
    wrapper(batches[1])
    assert "draws random numbers" in str(wrapper.unshared)


@pytest.mark.filterwarnings("ignore")  # of torch, while it compiles
@pytest.mark.parametrize("what", ["wrapper", "method", "method in place"])
def test_compiled_parts_take_the_same_steps(what: str) -> None:
    """A compiled method never leaves its strong views out: inductor gives the labeled loss of such a step no graph."""
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Normalised().double()
        method = FixMatch(model, threshold=0.45)
        if compiled and what == "method in place":
            method.compile(backend="aot_eager")
        own = torch.compile(method, backend="aot_eager") if compiled and what == "method" else method
        wrapper = GGCRWrapper(own, GradientConsistencyLoss(model), warmup_steps=0, weight=0.5)
        step = torch.compile(wrapper, backend="aot_eager") if compiled and what == "wrapper" else wrapper
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in methods.data(3):
            optimizer.zero_grad()
            loss = step(batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if compiled and what != "wrapper":
            assert "`method` is compiled" in str(wrapper.unshared)
        else:
            assert wrapper.unshared is None
    torch.testing.assert_close(losses[3:], losses[:3], rtol=1e-9, atol=0.0)


def test_a_function_as_method_is_pointed_to_with_losses() -> None:
    model = build(Normalised)
    with pytest.raises(ConfigError, match=r"`method` is a function.*call `with_losses`"):
        GGCRWrapper(lambda batch: model(batch.x).sum(), GradientConsistencyLoss(model), share=True)


def test_batchnorm_in_batch_mode_is_shared_on_demand_only() -> None:
    model, batches = methods.network(), methods.data(1)
    automatic = run(model, SHARING["fixmatch"], batches)
    assert "BatchNorm is in batch mode" in str(automatic[0].unshared)
    for joint in (True, False):
        _, (out,), _ = run(model, lambda m, j=joint: FixMatch(m, threshold=0.45, joint=j), batches, share=True)
        pair = out.pair
        _, losses = GradientConsistencyLoss(copy.deepcopy(model)).with_losses(*pair)
        assert float(out.logs["loss_unsupervised"]) == pytest.approx((pair.weight * losses).mean().item(), abs=1e-12)
    twin = copy.deepcopy(model)
    x, weak = twin(torch.cat([batches[0].x, batches[0].weak])).split([4, 9])  # a joint method keeps these together
    _, (out,), _ = run(model, lambda m: FixMatch(m, threshold=0.45), batches, share=True)
    assert torch.equal(out.pair.target, weak.argmax(1))
    assert float(out.logs["loss_supervised"]) == pytest.approx(F.cross_entropy(x, batches[0].y).item(), abs=1e-12)
    model.eval()  # running statistics: the same step again
    ordinary, shared = (run(model, SHARING["fixmatch"], batches, share=share) for share in (False, True))
    assert_same_steps(ordinary, shared)


def test_with_dropout_on_a_demanded_pass_has_another_draw() -> None:
    model, batches = build(layer(lambda: nn.Dropout(0.5))), methods.data(1)
    automatic = run(model, SHARING["fixmatch"], batches, loss={"dropout": "on"})
    assert "draws random numbers" in str(automatic[0].unshared)
    shared = run(model, SHARING["fixmatch"], batches, loss={"dropout": "on"}, share=True)
    assert shared[0].unshared is None


# -- with_losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
@pytest.mark.parametrize("soft", [False, True])
def test_with_losses_is_l_g_and_the_strong_losses(engine: str, soft: bool) -> None:
    model, batch = build(Normalised), methods.data(1)[0]
    target = model(batch.weak).detach().mul(0.5).softmax(1)
    target = target if soft else target.argmax(1)
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0, 1.0, 0.3, 1.0], dtype=torch.float64)
    factors = torch.linspace(-1, 1, 9, dtype=torch.float64)
    parameters = list(model.parameters())
    gc = GradientConsistencyLoss(model, engine=engine, chunk_size=4)
    term, losses = gc.with_losses(batch.weak, batch.strong, target, weight)
    found = torch.autograd.grad(0.7 * term + (factors * losses).sum(), parameters)
    expected = gc(batch.weak, batch.strong, target, weight)
    direct = F.cross_entropy(model(batch.strong), target, reduction="none") * (weight > 0)
    assert term.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(losses, direct, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(0.7 * expected + (factors * direct).sum(), parameters)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


def test_with_losses_of_nothing_has_a_graph() -> None:
    model, batch = build(Normalised), methods.data(1)[0]
    target = torch.zeros(9, dtype=torch.long)
    _, losses = GradientConsistencyLoss(model).with_losses(batch.weak, batch.strong, target, torch.zeros(9))
    losses.sum().backward()  # also without the term
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_pairs": 3}, "max_pairs=3"),
        ({"stop_gradient": "strong"}, "strong"),
        ({"engine": Silent()}, "gives_losses"),
    ],
)
def test_with_losses_refuses_what_leaves_losses_out(options: dict[str, Any], reason: str) -> None:
    model, batch = build(Normalised), methods.data(1)[0]
    with pytest.raises(ConfigError, match=f"`with_losses` needs the loss of every strong view, but .*{reason}"):
        GradientConsistencyLoss(model, **options).with_losses(batch.weak, batch.strong, torch.zeros(9).long())


def test_groups_that_answer_a_condition_differently_keep_their_losses() -> None:
    class Branches(Normalised):
        def forward(self, x: Tensor) -> Tensor:
            z, positive = super().forward(x), x.sum(1, keepdim=True) > 0
            return z * (1.0 + positive.double()) if bool(positive.any()) else z

    model, batch = build(Branches), methods.data(1)[0]
    target = torch.arange(9) % CLASSES
    found = GradientConsistencyLoss(model, engine="ghost").with_losses(batch.weak, batch.strong, target)[1]
    direct = [F.cross_entropy(model(x[None]), t[None]) for x, t in zip(batch.strong, target, strict=True)]
    torch.testing.assert_close(found, torch.stack(direct), rtol=0, atol=1e-12)
