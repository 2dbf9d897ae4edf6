"""Bad input: a named error with argument, finding and remedy.  The numbers are those of the plan's list of cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss, errors
from gradconsist.errors import (
    ConfigError,
    DeviceError,
    GradConsistError,
    GradModeError,
    InputShapeError,
    InputTypeError,
    InputValueError,
    LossContractError,
    NonFiniteError,
    ParameterSelectionError,
    UnsupportedModuleError,
)
from support import state
from support.changes import poke, put
from support.zoo import CASES, Problem


def test_one_family() -> None:
    """Every error is a GradConsistError and what a caller who knows only Python would catch."""
    bases = {
        "ConfigError": ValueError,
        "InputTypeError": TypeError,
        "InputShapeError": ValueError,
        "InputValueError": ValueError,
        "NonFiniteError": ValueError,
        "DeviceError": ValueError,
        "GradModeError": RuntimeError,
        "ParameterSelectionError": ValueError,
        "LossContractError": ValueError,
        "UnsupportedModuleError": NotImplementedError,
        "StateError": ValueError,
    }
    for name, base in bases.items():
        found = getattr(errors, name)
        assert issubclass(found, GradConsistError)
        assert issubclass(found, base)


@dataclass(frozen=True)
class Bad:
    """What is done to a good call, and what it must get."""

    name: str
    change: Callable[[dict[str, Tensor]], None]
    error: type[Exception] | tuple[type[Exception], ...]
    match: str
    problem: str = "mlp"


INPUTS = [
    Bad("1 batch sizes differ", put(strong=lambda x: x[:3]), InputShapeError, "strong.*3|weak.*5"),
    Bad(
        "3 no pairs", put(weak=lambda x: x[:0], strong=lambda x: x[:0], target=lambda t: t[:0]), InputShapeError, "weak"
    ),
    Bad("4 a scalar", put(weak=torch.tensor(1.0)), InputShapeError, "weak"),
    Bad("5 labels too few", put(target=lambda t: t[:4]), InputShapeError, "target"),
    Bad("6 float labels", put(target=lambda t: t.double()), (InputTypeError, InputShapeError), "target"),
    Bad("7 label = C", poke("target", 2, 3), InputValueError, "target.*3"),
    Bad("8 negative label", poke("target", 2, -1), InputValueError, "target.*-1"),
    Bad("9 soft labels do not sum to 1", put(target=lambda t: t * 2), InputValueError, "target", "mlp_soft_target"),
    Bad("10 negative soft label", poke("target", (0, 0), -0.5), InputValueError, "target", "mlp_soft_target"),
    Bad("11 integer images", put(weak=lambda x: x.to(torch.uint8)), (InputTypeError, GradConsistError), "weak"),
    Bad("12 complex", put(weak=lambda x: x.to(torch.complex64)), InputTypeError, "weak.*complex"),
    Bad("13 sparse", put(weak=lambda x: x.to_sparse()), InputTypeError, "weak.*sparse"),
    Bad(
        "14 quantised",
        put(strong=lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8)),
        InputTypeError,
        "strong",
    ),
    Bad("15 a list of rows", put(weak=lambda x: [row for row in x]), GradConsistError, "weak|strong"),  # noqa: C416
    Bad("16 not a tensor", put(weak=[1.0, 2.0]), InputTypeError, "weak"),
    Bad("17 none", put(strong=None), InputTypeError, "strong"),
    Bad("17 no target", put(target=None), InputTypeError, "target"),
    Bad("18 nested", put(weak=lambda x: torch.nested.nested_tensor(list(x))), InputTypeError, "weak.*nested"),
    Bad("19 nan in a view", poke("weak", (1, 0), float("nan")), NonFiniteError, "weak"),
    Bad("20 inf in a view", poke("strong", (1, 0), float("inf")), NonFiniteError, "strong"),
    Bad("21 nan in a label", poke("target", (0, 0), float("nan")), NonFiniteError, "target", "mlp_soft_target"),
    Bad("23 negative weight", put(weight=-torch.ones(5)), InputValueError, "weight"),
    Bad("weight of another size", put(weight=torch.ones(4)), InputShapeError, "weight"),
    Bad("weight of two dimensions", put(weight=torch.ones(5, 1)), InputShapeError, "weight"),
    Bad("nan weight", put(weight=torch.full((5,), float("nan"))), NonFiniteError, "weight"),
    Bad("weight is a list", put(weight=[1, 1, 1, 1, 1]), InputTypeError, "weight"),
    Bad("soft target of another width", put(target=torch.full((5, 4), 0.25).double()), InputShapeError, "target"),
    Bad("27 meta tensors", put(weak=lambda x: x.to("meta"), strong=lambda x: x.to("meta")), DeviceError, "weak|meta"),
    Bad(
        "views of different structure", put(strong=lambda x: {"x": x}), (InputTypeError, InputShapeError), "strong|weak"
    ),
    Bad(
        "constants that differ",
        put(weak=lambda x: {"input": x, "on": True}, strong=lambda x: {"on": False, "input": x}),
        InputValueError,
        r"`weak\['on'\]` is True and `strong\['on'\]` is False: .*pass the same in both",
    ),
    Bad(
        "constants of two types",
        put(weak=lambda x: (x, 1), strong=lambda x: (x, True)),
        InputValueError,
        r"`weak\[1\]` is 1 and `strong\[1\]` is True",
    ),
    Bad(
        "a tensor for a constant",
        put(weak=lambda x: {"input": x, "mask": x}, strong=lambda x: {"input": x, "mask": None}),
        InputTypeError,
        r"`weak\['mask'\]` is a tensor and `strong\['mask'\]` is None: pass a tensor in both, or the same constant",
    ),
    Bad(
        "texts",
        put(weak=lambda x: {"input": x, "text": ["a"] * 5}),
        InputTypeError,
        r"`weak\['text'\]` is a list, not a tensor: tokenize texts first",
    ),
    Bad("nothing but texts", put(weak=["a"] * 5), InputTypeError, "`weak` holds no tensor: tokenize texts first"),
    Bad("one text", put(strong="a b c"), InputTypeError, "`strong` is a str, not a tensor: tokenize texts first"),
    Bad(
        "nothing but constants",
        put(weak={"on": True, "mask": None}),
        InputTypeError,
        "`weak` holds no tensor: pass a tensor.*constants such as",
    ),
    Bad(
        "arrays among tensors",
        put(strong=lambda x: (x, x.numpy())),
        InputTypeError,
        r"`strong\[1\]` is a ndarray, not a tensor.*torch\.from_numpy",
    ),
    Bad(
        "a number as a tensor",
        put(weak=lambda x: (x, torch.tensor(2.0))),
        InputShapeError,
        r"`weak\[1\]` has no dim.*as a Python number",
    ),
    Bad("an empty dict", put(weak={}, strong={}), (InputTypeError, InputShapeError), "weak"),
]


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning", "ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
@pytest.mark.parametrize("bad", INPUTS, ids=lambda bad: bad.name)
def test_inputs(bad: Bad, engine: str) -> None:
    p = CASES[bad.problem].problem()
    arguments: dict[str, Any] = {"weak": p.weak, "strong": p.strong, "target": p.target}
    bad.change(arguments)
    gc = GradientConsistencyLoss(p.model, engine=engine)
    before = {**state.of_process(), **state.of_model(p.model)}
    for call in (gc, gc.measure):
        with pytest.raises(bad.error, match=bad.match) as caught:
            call(**arguments)
        assert isinstance(caught.value, GradConsistError)
    assert state.differences(before, {**state.of_process(), **state.of_model(p.model)}) == []


def test_49_a_tuple_that_holds_logits() -> None:
    """What a model of transformers returns with ``return_dict=False``."""

    class Flagged(nn.Linear):
        def forward(self, input: Tensor, return_dict: bool) -> Any:  # type: ignore[override]
            logits = super().forward(input)
            return {"logits": logits} if return_dict else (logits, None)

    p = CASES["mlp"].problem()
    gc = GradientConsistencyLoss(Flagged(5, 3).double())
    gc((p.weak, True), (p.strong, True), p.target)
    with pytest.raises(LossContractError, match=r"output is a tuple \(tensor \[1, 3\], NoneType\), .*pass `loss_fn="):
        gc((p.weak, False), (p.strong, False), p.target)


def test_22_nan_in_a_parameter() -> None:
    p = CASES["mlp"].problem()
    with torch.no_grad():
        p.model[2].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"2.weight"):
        GradientConsistencyLoss(p.model)(*p.views)


def test_24_all_weights_zero_is_valid() -> None:
    p = CASES["mlp"].problem()
    loss = GradientConsistencyLoss(p.model)(*p.views, torch.zeros(5))
    assert loss.requires_grad
    assert float(loss.detach()) == 0.0


def test_one_contiguous_wrong_channel_count_names_the_view() -> None:
    """2: the model's own error passes through, or is wrapped: in both cases nothing is left behind."""
    p = CASES["cnn_batchnorm_train"].problem()
    before = {**state.of_process(), **state.of_model(p.model)}
    with pytest.raises((RuntimeError, GradConsistError), match="channels"):
        GradientConsistencyLoss(p.model)(p.weak[:, :2], p.strong[:, :2], p.target)
    assert state.differences(before, {**state.of_process(), **state.of_model(p.model)}) == []


# -- grad mode and selection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "graph"])
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_28_under_no_grad(engine: str, fused: bool) -> None:
    p = CASES["mlp"].problem()
    gc = GradientConsistencyLoss(p.model, engine=engine, fused=fused)
    with torch.no_grad(), pytest.raises(GradModeError, match=r"no_grad.*measure"):
        gc(*p.views)


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_29_under_inference_mode(engine: str) -> None:
    p = CASES["mlp"].problem()
    gc = GradientConsistencyLoss(p.model, engine=engine)
    with torch.inference_mode(), pytest.raises(GradModeError, match="inference_mode"):
        gc(*p.views)


def test_29_tensors_made_under_inference_mode() -> None:
    p = CASES["mlp"].problem()
    with torch.inference_mode():
        weak = p.weak.clone()
    gc = GradientConsistencyLoss(p.model)
    try:
        loss = gc(weak, p.strong, p.target)
    except GradConsistError as error:
        assert "weak" in str(error)  # noqa: PT017
    else:
        assert abs(float(loss.detach()) - float(p.judge().verdict().loss)) <= 1e-7


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_30_everything_frozen(engine: str) -> None:
    p = CASES["mlp"].problem()
    p.model.requires_grad_(False)
    with pytest.raises((ParameterSelectionError, GradModeError), match=r"requires_grad|frozen|trainable"):
        GradientConsistencyLoss(p.model, engine=engine)(*p.views)


SELECTIONS: list[tuple[str, Callable[[nn.Module], Any], str]] = [
    ("31 a predicate that matches nothing", lambda m: lambda name: False, "encoder"),
    ("an empty sequence", lambda m: [], "encoder"),
    ("a module without parameters", lambda m: m[1], "encoder"),
    ("a module of another model", lambda m: nn.Linear(2, 2), "encoder"),
    ("a name", lambda m: "encoder", "encoder"),
    ("parameters instead of modules", lambda m: list(m.parameters()), "encoder"),
    ("a number", lambda m: 3, "encoder"),
]


@pytest.mark.parametrize(("encoder", "match"), [s[1:] for s in SELECTIONS], ids=[s[0] for s in SELECTIONS])
def test_selection(encoder: Callable[[nn.Module], Any], match: str) -> None:
    p = CASES["mlp"].problem()
    with pytest.raises((ParameterSelectionError, ConfigError), match=match):
        GradientConsistencyLoss(p.model, encoder=encoder(p.model))(*p.views)


def test_an_encoder_that_is_all_frozen() -> None:
    p = CASES["mlp"].problem()
    p.model[0].requires_grad_(False)
    with pytest.raises((ParameterSelectionError, GradModeError), match="encoder"):
        GradientConsistencyLoss(p.model, encoder=p.model[0])(*p.views)


def test_a_compared_parameter_that_no_sample_uses_is_fine() -> None:
    """A table of more rows than the batch names, a branch not taken: a zero gradient, as autograd says."""
    p = CASES["mlp"].problem()
    reference = p.judge().verdict()
    p.model.register_module("unused", nn.Linear(3, 3).double())
    p.model.forward = lambda x: p.model[4](p.model[3](p.model[2](p.model[1](p.model[0](x)))))
    for engine in ("loop", "vmap", "ghost"):
        record = GradientConsistencyLoss(p.model, engine=engine).measure(*p.views)
        torch.testing.assert_close(record.cosine, reference.cosine, rtol=0.0, atol=1e-10)


# -- the user's loss ---------------------------------------------------------------------------------------------------

LOSSES: list[tuple[str, Callable[[Tensor, Tensor], Any], str]] = [
    ("34 detached", lambda z, t: nn.functional.cross_entropy(z.detach(), t, reduction="none"), "loss_fn"),
    ("35 a scalar", nn.functional.cross_entropy, "loss_fn.*reduction"),
    ("36 wrong shape", lambda z, t: torch.log_softmax(z, 1), "loss_fn"),
    ("36 not a tensor", lambda z, t: 1.0, "loss_fn"),
    ("36 none", lambda z, t: None, "loss_fn"),
]


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
@pytest.mark.parametrize(("loss_fn", "match"), [s[1:] for s in LOSSES], ids=[s[0] for s in LOSSES])
def test_loss_functions(loss_fn: Callable[[Tensor, Tensor], Any], match: str, engine: str) -> None:
    p = CASES["mlp"].problem()
    gc = GradientConsistencyLoss(p.model, engine=engine, loss_fn=loss_fn)
    with pytest.raises(LossContractError, match=match):
        gc(*p.views)


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
@pytest.mark.parametrize(
    "output", [lambda z: {"scores": z}, lambda z: [z], lambda z: z[:, :, None], lambda z: 3], ids=range(4)
)
def test_49_outputs_without_logits(output: Callable[[Tensor], Any], engine: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Any:
            return output(self.linear(x))

    p = CASES["mlp"].problem()
    with pytest.raises(LossContractError, match="logits"):
        GradientConsistencyLoss(Model(), engine=engine)(*p.views)


# -- modules that are refused ------------------------------------------------------------------------------------------


def _embedding(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4, **options), nn.Flatten(), nn.Linear(16, 3)).double()


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, mode="sum"), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))


class Mixed(nn.Module):
    """Attention across the samples of a batch: no per-sample gradient exists, and no module type says so."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x - x.mean(0, keepdim=True))


class Distances(nn.Module):
    """Between the points of a sample and their images."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x.cos(), p=3.0)


TOKENS = CASES["tied_embedding"].inputs(torch.Generator().manual_seed(0))[:5]

REFUSED: list[tuple[str, Callable[[], nn.Module], Any, str]] = [
    ("40 compiled", lambda: torch.compile(nn.Linear(5, 3)), "vector", "(?i)compile"),
    (
        "40 a compiled part",
        lambda: nn.Sequential(torch.compile(nn.Linear(5, 6)), nn.Linear(6, 3)),
        "vector",
        "(?i)compile.*0|0.*compile",
    ),
    ("44 DataParallel", lambda: nn.DataParallel(nn.Linear(5, 3)), "vector", "DataParallel"),
    ("45 lazy", lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)), "vector", "(?i)lazy|uninitialized"),
    ("47 EmbeddingBag", Bag, "tokens", "EmbeddingBag.*bag|bag.*EmbeddingBag"),
    (
        "47 cdist",
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (3, 2)), Distances(), nn.Flatten(), nn.Linear(9, 3)),
        "vector",
        "without a second derivative.*_cdist_backward",
    ),
    ("embedding with max_norm", lambda: _embedding(max_norm=1.0), "tokens", "max_norm"),
    ("embedding with scale_grad_by_freq", lambda: _embedding(scale_grad_by_freq=True), "tokens", "scale_grad_by_freq"),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile imports it
@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost", "auto"])
@pytest.mark.parametrize(("build", "kind", "match"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_modules(build: Callable[[], nn.Module], kind: str, match: str, engine: str) -> None:
    if "cdist" in match and torch.__version__ >= "2.14":
        pytest.skip("this torch has the second derivative of cdist")
    x = TOKENS if kind == "tokens" else CASES["mlp"].inputs(torch.Generator().manual_seed(0))[:5]
    model = build()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    x = x.to(dtype) if x.is_floating_point() else x
    with pytest.raises(UnsupportedModuleError, match=match):
        GradientConsistencyLoss(model, engine=engine)(x, x.flip(0), torch.arange(5) % 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_41_scripted_models_are_refused() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    x = torch.randn(5, 5)
    with pytest.raises(UnsupportedModuleError, match=r"(?i)script"):
        GradientConsistencyLoss(model)(x, x.flip(0), torch.arange(5) % 3)


def test_43_raw_ddp_is_refused(tmp_path: Any) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch build has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(5, 3))
        with pytest.raises(UnsupportedModuleError, match=r"DDP\(|DistributedDataParallel.*GGCRWrapper"):
            GradientConsistencyLoss(model)(torch.randn(5, 5), torch.randn(5, 5), torch.arange(5) % 3)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_a_model_that_mixes_samples_is_refused(engine: str) -> None:
    """Its output for one sample depends on the others: a per-sample gradient would be of another function."""
    model, x = Mixed(), torch.randn(5, 5)
    with pytest.raises(GradConsistError, match=r"(?i)batch|sample"):
        GradientConsistencyLoss(model, engine=engine)(x, x.flip(0), torch.arange(5) % 3)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_46_reentrant_checkpoints_are_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(torch.tanh, self.stem(x), use_reentrant=True))

    x = torch.randn(5, 5)
    for engine in ("loop", "vmap", "ghost", "auto"):
        with pytest.raises((UnsupportedModuleError, RuntimeError), match="use_reentrant"):
            GradientConsistencyLoss(Reentrant(), engine=engine)(x, x.flip(0), torch.arange(5) % 3)


class _NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_50_a_custom_function_without_double_backward_is_an_error() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(_NoDoubleBackward.apply(torch.tanh(self.stem(x))))

    x = torch.randn(5, 5)
    for engine in ("loop", "vmap", "ghost", "auto"):
        with pytest.raises(
            (UnsupportedModuleError, RuntimeError), match=r"(?i)differentiable|generate_vmap_rule|Function"
        ):
            GradientConsistencyLoss(Custom(), engine=engine)(x, x.flip(0), torch.arange(5) % 3).backward()


# -- configuration -----------------------------------------------------------------------------------------------------

CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    ({"engine": "lop"}, "engine.*loop"),
    ({"engine": 3}, "engine"),
    ({"engine": None}, "engine"),
    ({"projection": 64}, "projection.*RandomProjection"),
    ({"min_norm": 0.0}, "min_norm"),
    ({"min_norm": -1e-8}, "min_norm"),
    ({"min_norm": float("nan")}, "min_norm"),
    ({"min_norm": "small"}, "min_norm"),
    ({"chunk_size": 0}, "chunk_size"),
    ({"chunk_size": -1}, "chunk_size"),
    ({"chunk_size": 2.5}, "chunk_size"),
    ({"chunk_size": True}, "chunk_size"),
    ({"chunk_size": "all"}, "chunk_size"),
    ({"max_pairs": 0}, "max_pairs"),
    ({"max_pairs": 1.5}, "max_pairs"),
    ({"max_pairs": True}, "max_pairs"),
    ({"batchnorm": "train"}, "batchnorm"),
    ({"dropout": True}, "dropout"),
    ({"stop_gradient": "both"}, "stop_gradient"),
    ({"reduction": "avg"}, "reduction"),
    ({"reduction": "none"}, "fused"),
    ({"fused": "yes"}, "fused"),
    ({"loss_fn": 3}, "loss_fn"),
]


@pytest.mark.parametrize(("options", "match"), CONFIGURATIONS, ids=[str(options) for options, _ in CONFIGURATIONS])
def test_configurations(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        GradientConsistencyLoss(nn.Linear(5, 3), **options)


def test_min_norm_below_what_the_dtype_resolves() -> None:
    """55: a floor of 1e-30 on a float32 norm whose square underflows: refused, or it still catches zero gradients."""
    p = CASES["mlp_soft_target"].problem(dtype=torch.float32)
    with torch.no_grad():
        p.target[:] = torch.softmax(p.model(p.weak), 1)
    try:
        gc = GradientConsistencyLoss(p.model, min_norm=1e-30)
        loss = gc(*p.views)
    except GradConsistError as error:
        assert "min_norm" in str(error)  # noqa: PT017
        return
    assert torch.isfinite(loss)


@pytest.mark.parametrize("model", [None, "model", lambda x: x, nn.Linear], ids=["none", "string", "function", "class"])
def test_a_model_that_is_no_module(model: Any) -> None:
    with pytest.raises((ConfigError, InputTypeError), match="model"):
        GradientConsistencyLoss(model)


def test_a_state_of_something_else() -> None:
    gc = GradientConsistencyLoss(nn.Linear(5, 3))
    before = gc.state_dict()
    for value in ({}, {"generator": 3}, {"other": torch.zeros(3)}, None):
        with pytest.raises(GradConsistError, match="state"):
            gc.load_state_dict(value)
    assert str(gc.state_dict()) == str(before)


def test_messages_do_not_print_whole_tensors() -> None:
    p: Problem = CASES["mlp"].problem(pairs=5)
    weak = p.weak.clone()
    weak[0, 0] = float("nan")
    with pytest.raises(GradConsistError, match="weak") as caught:
        GradientConsistencyLoss(p.model)(weak, p.strong, p.target)
    assert len(str(caught.value)) < 500
    assert "tensor(" not in str(caught.value)
