"""Models, selections, losses and states that are refused: by name, with a remedy. Bad calls: test_bad_inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss, errors
from gradconsist._refusals.limits import explain
from gradconsist.errors import (
    ConfigError,
    GradConsistError,
    InputTypeError,
    InputValueError,
    LossContractError,
    ModelError,
    ParameterSelectionError,
    UnsupportedModuleError,
)
from support import models, state
from support.nets import Layers
from support.zoo import CASES


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
        "ModelError": RuntimeError,
        "UnsupportedModuleError": NotImplementedError,
        "StateError": ValueError,
    }
    for name, base in bases.items():
        found = getattr(errors, name)
        assert issubclass(found, GradConsistError)
        assert issubclass(found, base)


# -- the user's model fails -------------------------------------------------------------------------------------------


class Text(nn.Module):
    """Ids [n, 4] and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 2), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        return self.head((self.words(ids) * mask[:, :, None]).flatten(1)) * scale


class AnyKeys(Text):
    def forward(self, **views: Tensor) -> Tensor:
        return super().forward(views["ids"], views["mask"])


def _sized(shaped: Callable[[Tensor], Tensor]) -> nn.Module:
    """A forward for batches that `shaped` takes."""
    return Layers(lambda m, x: m.layer(shaped(x)).log_softmax(1), layer=nn.Linear(5, 3))


def _guarded(x: Tensor) -> Tensor:
    """Says what an exported program says of a batch of another size."""
    if len(x) != 8:
        raise AssertionError("Guard failed: x.size()[0] == 8")
    return x


IDS, MASK = torch.arange(20).reshape(5, 4) % 7, torch.ones(5, 4)
IMAGES = torch.linspace(-1, 1, 5 * 3 * 6 * 6).reshape(5, 3, 6, 6)
VECTORS = torch.linspace(-1, 1, 25).reshape(5, 5)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@dataclass(frozen=True)
class Fails:
    """A model, its weak and strong views, and what is said of its failure."""

    name: str
    build: Callable[[], nn.Module]
    weak: Any
    strong: Any
    match: str
    error: type[Exception] = ModelError
    cause: type[Exception] = RuntimeError


class Elsewhere(nn.Linear):
    """Adds a tensor that is no buffer, and stays where it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(3, device="meta")


FAILS = [
    Fails("width", _mlp, VECTORS[:, :4], VECTORS[:, 1:], r"`weak` and `strong` \(torch.float32, shape \(5, 4\)\) in"
          r" `model\.0` \(Linear\): RuntimeError: .*\. The Linear takes in_features=5"),
    Fails("width of one view", _mlp, VECTORS, VECTORS[:, :4], r"failed on `strong` .* in_features=5"),
    Fails("width inside", _cnn, IMAGES[:, :2], IMAGES[:, :2], r"`model\.0` \(Conv2d\).*in_channels=3 as the size"),
    Fails("channels last", _cnn, IMAGES.movedim(1, 3), IMAGES.movedim(1, 3), r"channels-last.*permute\(0, 3, 1, 2\)"),
    Fails("too small", _cnn, IMAGES[:, :, :2], IMAGES[:, :, :2], r"\(5, 3, 2, 6\)\) in `model\.0` .*one sample"),
    Fails("float64", _mlp, VECTORS.double(), VECTORS.double(), r"torch\.float64.* are torch\.float32: convert"
          r" the inputs with `\.float\(\)`, or the model with `\.double\(\)`"),
    Fails("half images", _cnn, IMAGES.half(), IMAGES.half(), r"`\.float\(\)`, or the model with `\.half\(\)`"),
    Fails("a tensor elsewhere", lambda: Elsewhere(5, 3), VECTORS, VECTORS, r"\(Elsewhere\): .*device.*as buffers"),
    Fails("integers", _mlp, VECTORS.long(), VECTORS.long(), r"torch\.int64.*convert the inputs with `\.float\(\)`\.$"),
    Fails("ids as floats", Text, {"ids": IDS.float(), "mask": MASK}, {"ids": IDS.float(), "mask": MASK},
          r"`weak\['ids'\]` .*`strong\['mask'\]` .*`model\.words` \(Embedding\).*integers: pass ids with `\.long\(\)`"),
    Fails("ids too large", Text, {"ids": IDS, "mask": MASK}, {"ids": IDS + 1, "mask": MASK},
          r"failed on `strong\['ids'\]` .*`model\.words`.*ids from 0 to 6 \(num_embeddings=7\)", cause=IndexError),
    Fails("a key less", Text, {"ids": IDS}, {"ids": IDS}, r"`weak` has the keys 'ids', but the forward of Text takes"
          r" 'ids', 'mask', 'scale' \(optional\) \(missing 'mask'\)", InputTypeError, TypeError),
    Fails("a key more", Text, {"ids": IDS, "mask": MASK, "y": IDS}, {"ids": IDS, "mask": MASK, "y": IDS},
          r"`weak` has the keys 'ids', 'mask', 'y', .*\(extra 'y'\)", InputTypeError, TypeError),
    Fails("another key", Text, {"ids": IDS, "msk": MASK}, {"ids": IDS, "msk": MASK}, r"\(missing 'mask'; extra 'msk'\)",
          InputTypeError, TypeError),
    Fails("a key less of any", AnyKeys, {"ids": IDS, "msk": MASK}, {"ids": IDS, "msk": MASK},
          r"`model` \(AnyKeys\): KeyError: 'mask'.*does not name the keys 'ids', 'msk'", cause=KeyError),
    Fails("a tensor for two", Text, IDS, IDS, r"`weak` gives the model 1 tensor, .* missing .*'mask'\. Pass a tuple",
          InputTypeError, TypeError),
    Fails("two for one", _mlp, (VECTORS, VECTORS), (VECTORS, VECTORS), "`weak` gives the model 2 tensors.*takes 'in",
          InputTypeError, TypeError),
    Fails("width after a BatchNorm", lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(4, 3)), VECTORS, VECTORS,
          r"`model\.1` \(Linear\).*in_features=4"),  # one sample alone fails in the BatchNorm, which says nothing
    Fails("batches of 5", lambda: _sized(lambda x: x.view(5, 5)), VECTORS, VECTORS, "batches of size 5,.*any batch",
          UnsupportedModuleError),
    Fails("batches of 1", lambda: _sized(lambda x: x.view(1, 5)), VECTORS, VECTORS, "batches of size 1,.*any batch",
          UnsupportedModuleError),
    Fails("batches of 2 or more", lambda: _sized(lambda x: x.squeeze()), VECTORS, VECTORS, "batches of size 2 or more",
          UnsupportedModuleError, IndexError),
    Fails("exported for batches of 8", lambda: _sized(_guarded), VECTORS, VECTORS,
          "only batches of size 8,.*dynamic_shapes=", UnsupportedModuleError, AssertionError),
]  # fmt: skip


@pytest.mark.parametrize("case", FAILS, ids=lambda case: case.name)
def test_failures_of_the_model(case: Fails) -> None:
    """Named with view, module and remedy, from torch's own error, and nothing is left behind."""
    with torch.random.fork_rng(devices=[]):
        gc = GradientConsistencyLoss(case.build())
    before = state.snapshot(gc.model)
    for call in (gc, gc.measure):
        with pytest.raises(case.error, match=case.match) as caught:
            call(case.weak, case.strong, torch.arange(5) % 3)
        assert isinstance(caught.value.__cause__, case.cause)
    assert state.differences(before, state.snapshot(gc.model)) == []


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_a_failure_in_a_later_call(engine: str) -> None:
    """After the first call nothing is tried any more, so that it is the comparison that fails."""
    with torch.random.fork_rng(devices=[]):
        gc = GradientConsistencyLoss(_mlp(), engine=engine)
    gc(VECTORS, VECTORS.flip(1), torch.arange(5) % 3)
    with pytest.raises(ModelError, match=r"`weak` and `strong` .*\(4, 3\)\) in `model\.0` \(Linear\).*in_features=5"):
        gc(VECTORS[:4, :3], VECTORS[:4, 1:4], torch.arange(4) % 3)


def test_a_failure_inside_the_comparison_only() -> None:
    """The model runs by itself; what fails is a forward whose parameters are stand-ins."""

    def picky(m: Any, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise ValueError("not like this")
        return m.layer(x)

    with pytest.raises(
        ModelError, match=r"runs on `weak`.* alone, but failed .*`model` \(Layers\): ValueError: not like"
    ):
        GradientConsistencyLoss(Layers(picky, layer=nn.Linear(5, 3)))(VECTORS, VECTORS.flip(0), torch.arange(5) % 3)


class UsersError(RuntimeError):
    """An exception class that is not torch's."""


@pytest.mark.parametrize("error", [UsersError, torch.OutOfMemoryError], ids=lambda error: error.__name__)
def test_other_exceptions_pass_unchanged(error: type[Exception]) -> None:
    def shaped(x: Tensor) -> Tensor:
        raise error("as it is")

    with pytest.raises(error, match=r"^as it is$") as caught:
        GradientConsistencyLoss(_sized(shaped))(VECTORS, VECTORS, torch.arange(5) % 3)
    assert not isinstance(caught.value, GradConsistError)


# -- grad mode and selection -------------------------------------------------------------------------------------------


def _frozen(*positions: int) -> Callable[[nn.Module], Any]:
    """Freezes layers and selects them: one as a module, several as a list."""

    def select(model: nn.Module) -> Any:
        layers = [model[position].requires_grad_(False) for position in positions]
        return layers[0] if len(layers) == 1 else layers

    return select


def _frozen_by_name(model: nn.Module) -> Any:
    model[0].requires_grad_(False)
    return lambda name: name.startswith("0.")


FROZEN = r"the encoder is frozen: none of the {} parameters .*{}.* Unfreeze them with `{}"
SELECTIONS: list[tuple[str, Callable[[nn.Module], Any], str]] = [
    ("an empty sequence", lambda m: [], "`encoder` select none of the 6"),
    ("a module without parameters", lambda m: m[1], "`encoder` select none of the 6"),
    ("a module of another model", lambda m: nn.Linear(2, 2), "`encoder` contains a Linear.*not a copy"),
    ("a path", lambda m: "0", r"`encoder` is the string '0': pass .*get_submodule\('0'\).*startswith\('0\.'\)"),
    ("a word", lambda m: "encoder", r"`encoder` is the string 'encoder': pass the module itself, or a predicate"),
    ("names", lambda m: ["2.weight"], r"`encoder\[0\]` is the string '2.weight': pass .*predicate"),
    ("parameters in a list", lambda m: list(m.parameters()), r"`encoder\[0\]` is of type Parameter, not a module"),
    ("parameters", lambda m: m.parameters(), "`encoder` is of type generator: pass a module"),
    ("a number", lambda m: 3, "`encoder` is of type int: pass a module"),
    ("a frozen module", _frozen(0), FROZEN.format(2, r"0\.weight, 0\.bias", "encoder.requires_grad_")),
    ("frozen modules", _frozen(0, 2), FROZEN.format(4, r"2\.weight", "for module in encoder: module.requires_grad_")),
    ("frozen, by a predicate", _frozen_by_name,
     FROZEN.format(2, r"0\.weight", r"\[p\.requires_grad_\(True\) for name")),
]  # fmt: skip


@pytest.mark.parametrize(("encoder", "match"), [s[1:] for s in SELECTIONS], ids=[s[0] for s in SELECTIONS])
def test_selection(encoder: Callable[[nn.Module], Any], match: str) -> None:
    p = CASES["mlp"].problem()
    with pytest.raises(ParameterSelectionError, match=match):
        GradientConsistencyLoss(p.model, encoder=encoder(p.model))


# -- the user's loss ---------------------------------------------------------------------------------------------------


def _flat(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Flatten(0))


BINARY = "F.binary_cross_entropy_with_logits"
SEVERAL = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 1, 1]])
PIXELS = torch.zeros(5, 6, 6, dtype=torch.long)
CLASSES = torch.arange(5) % 3

# What the default loss is not for, with the loss that is.
OTHER_TASKS: list[tuple[str, Callable[[], nn.Module], Tensor, Tensor, type[Exception], str]] = [
    ("regression [B]", _mlp, VECTORS, VECTORS[:, 0], InputTypeError, r"`target\.long\(\)`.*regression pass `loss_fn="),
    ("regression [B, k]", _mlp, VECTORS, VECTORS[:, :3], InputValueError, "not prob.*for regression pass `loss_fn="),
    ("several labels", _mlp, VECTORS, SEVERAL.float(), InputValueError, f"several labels .*`loss_fn=lambda.*{BINARY}"),
    ("several whole labels", _mlp, VECTORS, SEVERAL, InputTypeError, f"several labels .*`loss_fn=lambda.*{BINARY}"),
    ("several flags", _mlp, VECTORS, SEVERAL.bool(), InputTypeError, f"several labels .*`loss_fn=lambda.*{BINARY}"),
    ("a class a pixel", _cnn, IMAGES, PIXELS, InputTypeError, r"pixel or token pass `loss_fn=.*flatten\(1\)"),
    ("logits a pixel", lambda: nn.Conv2d(3, 3, 1), IMAGES, CLASSES, LossContractError, "pixel or token pass `loss_fn="),
    ("one logit [B, 1]", lambda: nn.Linear(5, 1), VECTORS, CLASSES, LossContractError, f"logit .*always 0.*{BINARY}"),
    ("one logit [B]", lambda: _flat(nn.Linear(5, 1)), VECTORS, CLASSES, LossContractError, f"one logit.*{BINARY}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "x", "target", "error", "match"), [row[1:] for row in OTHER_TASKS], ids=[row[0] for row in OTHER_TASKS]
)
def test_other_tasks_are_told_their_loss(
    build: Callable[[], nn.Module], x: Tensor, target: Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        GradientConsistencyLoss(build())(x, x.flip(0), target)


@pytest.mark.parametrize("engine", ["loop", "vmap", "ghost"])
def test_a_loss_that_fails(engine: str) -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(output, target, reduction="none").mean(1)

    match = (
        r"`loss_fn` failed on an output \(torch.float32, shape \(1, 3\)\) and a target \(torch.int64, .*: ValueError"
    )
    with pytest.raises(ModelError, match=match):
        GradientConsistencyLoss(_mlp(), loss_fn=loss_fn, engine=engine)(VECTORS, VECTORS.flip(0), CLASSES)


@pytest.mark.parametrize("value", [1.0, None])
def test_a_loss_that_is_no_tensor(value: object) -> None:
    p = CASES["mlp"].problem()
    with pytest.raises(LossContractError, match="loss_fn"):
        GradientConsistencyLoss(p.model, loss_fn=lambda z, t: value)(*p.views)


#: What a model returns in place of logits, and words of the error; the tuple is transformers' with return_dict=False.
OUTPUTS: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda z: (z, None), r"output is a tuple \(tensor \[1, 3\], NoneType\), .*pass `loss_fn="),
    (lambda z: [z], "logits"),
    (lambda z: z[:, :, None], "logits"),
    (lambda z: 3, "logits"),
]


@pytest.mark.parametrize(("output", "match"), OUTPUTS, ids=["tuple", "list", "three dimensions", "number"])
def test_outputs_without_logits(output: Callable[[Tensor], Any], match: str) -> None:
    class Model(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return output(super().forward(input))

    with pytest.raises(LossContractError, match=match):
        GradientConsistencyLoss(Model(5, 3))(VECTORS, VECTORS.flip(0), CLASSES)


# -- modules that are refused ------------------------------------------------------------------------------------------


def _deformable(module: str = "torchvision.ops.deform_conv") -> nn.Module:
    """A layer that has the qualified name of torchvision's."""
    kind = type("DeformConv2d", (nn.Linear,), {"__module__": module, "__qualname__": "DeformConv2d"})
    return nn.Sequential(nn.Linear(5, 6), nn.Sequential(kind(6, 3)))


# Embeddings whose gradient depends on the batch: engines/test_operators.
REFUSED: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("47 cdist",
     lambda: _between(nn.Unflatten(1, (3, 2)), Own(lambda x: torch.cdist(x, x.cos(), p=3.0), 2), nn.Flatten(), inner=9),
     "without a second derivative.*_cdist_backward"),
    ("deformable convolution", _deformable, r"`model\.1\.0` is a DeformConv2d.*no second derivative: use Conv2d"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile imports it
@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize(("build", "match"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_modules(build: Callable[[], nn.Module], match: str, engine: str) -> None:
    if "cdist" in match and torch.__version__ >= "2.14":
        pytest.skip("this torch has the second derivative of cdist")
    with pytest.raises(UnsupportedModuleError, match=match):
        GradientConsistencyLoss(build(), engine=engine)(VECTORS, VECTORS.flip(0), torch.arange(5) % 3)


def test_a_frozen_deformable_convolution_is_taken() -> None:
    """Nothing is differentiated twice through it, if it is the first layer."""
    model = _deformable()
    model[1].requires_grad_(False)
    assert torch.isfinite(GradientConsistencyLoss(model)(VECTORS, VECTORS.flip(0), torch.arange(5) % 3))
    model[1].requires_grad_(True)
    with pytest.raises(UnsupportedModuleError, match="DeformConv2d"):
        GradientConsistencyLoss(model)
    GradientConsistencyLoss(_deformable("mine"))


# Functions of torchvision without a second derivative, by what they raise.
NO_DOUBLE = ["deform_conv2d", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"]


@pytest.mark.parametrize("name", NO_DOUBLE)
def test_functions_of_torchvision_are_explained(name: str) -> None:
    refusal = explain(RuntimeError(f"double backwards on {name} not supported"))
    with pytest.raises(UnsupportedModuleError, match=f"torchvision without a second derivative: replace it .*{name}"):
        raise refusal


class Own(nn.Module):
    """A layer, then a function in the module's own forward."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.inner, self.function = nn.Linear(width, width), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(x.mean(0, keepdim=True))  # in place: what went in must have been kept


def _stacked(layer: nn.Module) -> nn.Module:
    """Tokens, with the batch in dimension 1 as long as `layer` runs."""
    tokens = lambda x: x[:, :4].reshape(-1, 2, 2).repeat(1, 1, 3).transpose(0, 1)  # noqa: E731
    return Layers(lambda m, x: m.head(m.layer(tokens(x)).mean(0)), layer=layer, head=nn.Linear(6, 3))


def _along_batch() -> nn.Module:
    """Takes the batch for time: without batch_first, that is dimension 0."""
    return Layers(lambda m, x: m.layer(x[:, None])[0][:, 0], layer=nn.GRU(6, 6))


def _mixed() -> nn.Module:
    """Between its layers: no module's type says so."""
    mixed = lambda h: h - h.mean(0, keepdim=True)  # noqa: E731
    return Layers(lambda m, x: m.head(mixed(torch.tanh(m.stem(x)))), stem=nn.Linear(5, 6), head=nn.Linear(6, 3))


def _between(*layers: nn.Module, inner: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), *layers, nn.Linear(inner, 3))


def _centred_loss(z: Tensor, t: Tensor) -> Tensor:
    return nn.functional.cross_entropy(z - z.mean(0), t, reduction="none")


def _mixing_loss(z: Tensor, t: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(z, t, reduction="none")
    return loss - loss.mean().detach() * z[:, 0]


def _relative_loss(z: Tensor, t: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(z, t, reduction="none")
    return loss / loss[:1].detach()


MIXING: list[tuple[str, Callable[[], nn.Module], Any, str]] = [
    ("a layer that centres", lambda: _between(Centred()), None, r"from `model\.1` \(Centred\), which"),
    ("softmax over samples", lambda: _between(nn.Softmax(0)), None, r"from `model\.1` \(Softmax\), which"),
    ("in another order", lambda: _between(Own(lambda x: x.flip(0))), None, r"`model\.1` \(Own\), in its own forward,"),
    ("the norm of all", lambda: _between(Own(lambda x: x / x.norm())), None,
     r"`model\.1` \(Own\), in its own forward,"),
    ("a nested layer",
     lambda: _between(nn.BatchNorm1d(6), nn.Sequential(nn.Tanh(), nn.Sequential(nn.ReLU(), Centred()))), None,
     r"from `model\.2\.1\.1` \(Centred\), which"),
    ("the model's forward", _mixed, None, r"from the forward of `model` \(Layers\), outside its layers, which"),
    ("the loss itself", lambda: _between(nn.Tanh()), _mixing_loss, "from `loss_fn` "),
    ("loss_fn", lambda: _between(nn.Tanh()), _centred_loss, r"from `loss_fn` \(the model's output does not change\)"),
    ("attention over samples", lambda: _stacked(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)), None,
     r"`model\.layer\.self_attn` \(Multihead"),
    # The first sample is the same with another after it; the second one is not.
    ("a recurrent layer along the batch", lambda: _between(_along_batch()), None,
     r"`model\.1\.layer` \(GRU\), .*batch_first=False"),
    ("a running sum over samples", lambda: _between(Own(lambda x: x.cumsum(0))), None, r"`model\.1` \(Own\)"),
    ("relative to the first sample", lambda: _between(Own(lambda x: x - x[:1])), None, r"`model\.1` \(Own\)"),
    ("relative to the last sample", lambda: _between(Own(lambda x: x - x[-1:])), None, r"`model\.1` \(Own\)"),
    ("a memory that a later call reads", lambda: models.WithMemory(models.RunningCentre), None, r"`model\.layer`"),
    ("the first sample's loss", lambda: _between(nn.Tanh()), _relative_loss, "from `loss_fn` "),
]  # fmt: skip


@pytest.mark.parametrize(("build", "loss_fn", "match"), [m[1:] for m in MIXING], ids=[m[0] for m in MIXING])
def test_a_model_that_mixes_samples_is_refused(build: Callable[[], nn.Module], loss_fn: Any, match: str) -> None:
    """Its output for one sample depends on the others: a per-sample gradient would be of another function."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = build(), torch.randn(5, 5)
    before = state.of_model(model)
    with pytest.raises(UnsupportedModuleError, match="changes with the other samples.*" + match):
        GradientConsistencyLoss(model, loss_fn=loss_fn)(x, x.flip(0), torch.arange(5) % 3)
    assert state.differences(before, state.of_model(model)) == []


MANY: dict[str, Callable[[Tensor], Tensor]] = {
    "centred from three on": lambda x: x - x.mean(0) if len(x) > 2 else x,
    "the first by the third": lambda x: torch.cat([x[:1] + x[2:].sum(0, keepdim=True), x[1:]]),
    "rolled by two": lambda x: x if len(x) == 1 else x.roll(2, 0),
    "nearest neighbours": lambda x: x[torch.cdist(x, x).topk(min(3, len(x)), largest=False).indices[:, -1]]
    if len(x) > 2 else x,
    "rows in fours": lambda x: x.view(-1, 4, 6).cumsum(1).view(-1, 6) if len(x) % 4 == 0 else x,
    "halves exchanged": lambda x: x.view(2, -1, 6).flip(0).reshape(-1, 6) if len(x) % 4 == 0 else x,
    "rolled, times a number that is read": lambda x: (x.roll(2, 0) if len(x) > 2 else x) * torch.tensor(2.0).item(),
    "scaled in large batches": lambda x: x * (1.5 if len(x) > 4 else 1.0),
    "sorted from four on": lambda x: x.sort(0).values if len(x) > 3 else x,
    "the last one by the first": lambda x: torch.cat([x[:-1], x[-1:] + x[:1]]) if len(x) > 3 else x,
}  # fmt: skip


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("name", MANY)
def test_a_model_that_mixes_three_samples_or_more_is_refused(name: str, engine: str) -> None:
    model, x = _between(Own(MANY[name])), torch.randn(6, 5)
    for _ in range(2):  # a refusal holds
        with pytest.raises(UnsupportedModuleError, match=r"changes with the other samples.*from `model\.1` \(Own\)"):
            GradientConsistencyLoss(model, engine=engine)(x, x.flip(0), torch.arange(6) % 3)


@pytest.mark.parametrize("name", ["a rare sample by the mean", "rows in twos"])
def test_every_sample_is_looked_at(name: str) -> None:
    weak = torch.randn(60 if "rare" in name else 12, 5, generator=torch.Generator().manual_seed(0))
    function = lambda h: h.view(-1, 2, 6).cumsum(1).view(-1, 6) if len(h) % 2 == 0 else h  # noqa: E731
    if "rare" in name:
        weak[53] *= 999
        function = lambda h: torch.where(h.abs().amax(1, keepdim=True) > 99, h.mean(0, keepdim=True), h)  # noqa: E731
    with pytest.raises(UnsupportedModuleError, match="changes with the other samples"):
        GradientConsistencyLoss(_between(Own(function)))(weak, weak.flip(0), torch.arange(len(weak)) % 3)


class Later(nn.Module):
    """Mixes samples in long sequences, at a level, in every third call, or of large values."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 5), nn.Linear(5, 3)
        self.level, self.calls = 1, 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        h = self.table(ids).mean(1)
        mixes = ids.shape[1] > 4 or self.level == 2 or self.calls == 3
        return self.head(torch.tanh(h + h.flip(0) if mixes else h))


@pytest.mark.parametrize("change", ["length", "length of the strong views", "level", "calls", "number of samples"])
def test_a_way_that_only_a_later_call_takes_is_tried_too(change: str) -> None:
    model, target = Later(), torch.arange(6) % 3
    short, long = torch.randint(9, (6, 4)), torch.randint(9, (6, 7))
    weak, strong = short, short.roll(1, 0)
    if change == "number of samples":
        model = _between(Own(MANY["rows in fours"]))
        weak, strong = torch.randn(2, 6, 5)
        weight = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    gc = GradientConsistencyLoss(model)
    gc(weak, strong, target, weight if change == "number of samples" else None)
    if change == "level":
        model.level = 2
    if change == "calls":
        model(short), model(short)
    weak = long if change == "length" else weak
    strong = long.roll(1, 0) if "length" in change else strong
    for _ in range(2):  # a refusal holds
        with pytest.raises(UnsupportedModuleError, match="changes with the other samples"):
            gc(weak, strong, target)


def test_many_lengths_are_remembered_in_little_room() -> None:
    gc, target = GradientConsistencyLoss(Later()), torch.arange(6) % 3
    for length in (1, 2, 3, 4):
        ids = torch.randint(9, (6, length), generator=torch.Generator().manual_seed(length))
        gc(ids, ids.roll(1, 0), target)
    states = {id(fact[1]) for fact in gc._probed.passed if isinstance(fact, tuple)}
    assert len(gc._probed.passed) >= 8
    assert len(states) == 1


def test_a_way_that_only_some_data_take_is_looked_for_now_and_then() -> None:
    model, target = _between(Own(lambda h: torch.where(h.abs().amax() > 9, h + h.flip(0), h))), torch.arange(4) % 3
    gc, x = GradientConsistencyLoss(model), torch.randn(4, 5)
    for _ in range(15):
        gc(x, x.flip(0), target)
    with pytest.raises(UnsupportedModuleError, match="changes with the other samples"):
        gc(99 * x, 99 * x.flip(0), target)


class Asks(nn.Module):
    """Does something to the batch if all samples begin with a positive number."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.then = nn.Linear(5, 6).double(), nn.Linear(6, 3).double(), then

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(torch.tanh(self.then(h) if bool((x[:, 0] > 0).all()) else h))


class Decides(Asks):
    """The same by sample, without a condition."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(torch.tanh(torch.where(x[:, :1] > 0, self.then(h), h)))


def _signs() -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of which the first two begin with different signs."""
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[:, 0] = torch.tensor([1.0, -1.0] * 4)
    return x, x + 0.3 * x.flip(1), torch.arange(8) % 3


@pytest.mark.parametrize("engine", ["auto", "ghost", "vmap", "loop"])
def test_a_condition_is_answered_for_each_sample(engine: str) -> None:
    found = []
    for kind, own in ((Asks, engine), (Decides, "loop")):
        model = kind(lambda h: 3 * h)
        loss = GradientConsistencyLoss(model, engine=own)(*_signs())
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [3, 1])
def test_a_condition_that_changes_samples_is_told(factor: int, caplog: pytest.LogCaptureFixture) -> None:
    """The batch has one answer for all; that matters only if it changes the numbers."""
    gc = GradientConsistencyLoss(Asks(lambda h: factor * h))
    with caplog.at_level(logging.WARNING, "gradconsist"):
        for _ in range(2):
            gc(*_signs())
    assert caplog.text.count("asks something of its whole batch") == (factor == 3)


def test_samples_of_one_answer_must_not_mix() -> None:
    with pytest.raises(UnsupportedModuleError, match="changes with the other samples"):
        GradientConsistencyLoss(Asks(lambda h: h - 0.5 * h.mean(0)))(*_signs())


@pytest.mark.parametrize("part", ["function", "module"])
def test_a_part_at_the_address_of_an_earlier_one_is_tried_too(part: str) -> None:
    """A check that passed belongs to the object, not to its place in memory."""
    model = _between(Own(torch.tanh))
    gc, x = GradientConsistencyLoss(model), torch.randn(5, 5)
    of_functions = part == "function"
    owner, name = (model[1], "function") if of_functions else (model, "1")
    good: Callable[[], Any] = (lambda: lambda h: h.tanh()) if of_functions else nn.Tanh
    mixing: Callable[[], Any] = (lambda: lambda h: h.cumsum(0)) if of_functions else Centred
    neutral = torch.tanh if of_functions else nn.Identity()
    places: set[int] = set()
    for _ in range(20):
        setattr(owner, name, neutral)
        setattr(owner, name, good())
        places.add(id(getattr(owner, name)))
        gc(x, x.flip(0), torch.arange(5) % 3)
    setattr(owner, name, neutral)
    made = [mixing()]
    while id(made[-1]) not in places and len(made) < 20_000:  # those that are kept leave the old places to the next
        made.append(mixing())
    assert id(made[-1]) in places
    setattr(owner, name, made[-1])
    with pytest.raises(UnsupportedModuleError, match="changes with the other samples"):
        gc(x, x.flip(0), torch.arange(5) % 3)


class Counting(nn.Module):
    """Counts its calls, and mixes samples if a flag is set."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self.mixes, self.seen = nn.Linear(5, 3), 0, False, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        y = self.layer(x).tanh()
        return y + y.flip(0) if self.mixes else 2 * y


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_flag_is_noticed_and_a_counter_is_not_a_flag(engine: str) -> None:
    model, x, target = Counting(), torch.randn(4, 5), torch.arange(4) % 3
    gc = GradientConsistencyLoss(model, engine=engine)
    for _ in range(3):
        model(x)
        gc(x, x + 0.1, target)
        known = len(gc._probed.passed)
    model(x)
    gc(x, x + 0.1, target)
    assert len(gc._probed.passed) == known  # else every step would try the model again
    model.mixes = True
    with pytest.raises(UnsupportedModuleError, match="changes with the other samples"):
        gc(x, x + 0.1, target)


# -- what is no model, and no state (options: test_options) ------------------------------------------------------------


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
