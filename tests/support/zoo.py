"""The zoo: a table of models, each declaring its inputs, its target and what makes it nasty.

`CASES` maps a name to a `Case`.  `case.problem(dtype=...)` gives a fresh, seeded `Problem`; the global random state
is left alone.  A new layer rule or engine is tested by adding a row here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from . import models
from .oracle import Judge, Tape, Tree, Verdict, tree_map

PAIRS = 5


@dataclass
class Problem:
    """One call of the loss, ready to be made, and the oracle's view of the same problem."""

    case: Case
    model: nn.Module
    weak: Tree
    strong: Tree
    target: Tensor

    @property
    def arguments(self) -> tuple[nn.Module, Tree, Tree, Tensor]:
        return self.model, self.weak, self.strong, self.target

    @property
    def views(self) -> tuple[Tree, Tree, Tensor]:
        return self.weak, self.strong, self.target

    def judge(self, weight: Tensor | None = None, **options: Any) -> Judge:
        """The oracle on this problem."""
        options = {"reference": self.case.reference, "loss_fn": self.case.loss_fn, **options}
        if self.case.encoder is not None:
            options.setdefault("compared", self.case.encoder)
        return Judge(*self.arguments, weight, **options)


@dataclass(frozen=True)
class Case:
    """One row.  `vmap` and `ghost` are "exact", or "refused" where that engine cannot run the model."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tree]
    classes: int = 3
    soft: bool = False
    training: bool = True
    randomize: bool = True
    prepare: Callable[[nn.Module], None] | None = None  # after the parameters have been randomised
    reference: Callable[[nn.Module, Tape], None] | None = None  # rewrites the oracle's copy by hand
    loss_fn: Callable[[Any, Tensor], Tensor] | None = None
    encoder: Callable[[str], bool] | None = None
    vmap: str = "exact"
    ghost: str = "exact"

    def verdict(
        self, weight: Tensor | None = None, cotangent: Tensor | None = None, *, pairs: int = PAIRS, **options: Any
    ) -> Verdict:
        """The oracle on this model's problem, once a process: many tests and engines are held against it."""
        given = (None if each is None else tuple(each.tolist()) for each in (weight, cotangent))
        return _verdict(self, pairs, *given, tuple(sorted(options.items())))

    def problem(self, *, dtype: torch.dtype = torch.float64, seed: int = 0, pairs: int = PAIRS) -> Problem:
        generator = torch.Generator().manual_seed(1000 + seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
        model.train(self.training)
        if self.randomize:
            _randomize(model, generator)
        if self.prepare is not None:
            self.prepare(model)
        draw = lambda: tree_map(lambda x: _repeat(x, pairs), self.inputs(generator))  # noqa: E731
        cast = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
        weak = draw()
        # The strong view is a large perturbation of the weak one (or other tokens): cosines of every size.
        strong = tree_map(lambda x: _perturb(x, generator), weak)
        if self.soft:
            target = torch.softmax(2 * torch.randn(pairs, self.classes, generator=generator), dim=1)
        else:
            target = torch.randint(self.classes, (pairs,), generator=generator)
        return Problem(self, model.to(dtype), tree_map(cast, weak), tree_map(cast, strong), cast(target))


@functools.cache
def _verdict(case: Case, pairs: int, weight: Any, cotangent: Any, options: tuple[tuple[str, Any], ...]) -> Verdict:
    weight, cotangent = (None if each is None else torch.tensor(each).double() for each in (weight, cotangent))
    named = dict(options)
    problem = case.problem(dtype=named.pop("dtype", torch.float64), pairs=pairs)
    return problem.judge(weight, **named).verdict(cotangent)


def _repeat(x: Tensor, pairs: int) -> Tensor:
    """Generators of inputs draw 16 samples; take as many as asked for."""
    return x[:pairs]


def _perturb(x: Tensor, generator: torch.Generator) -> Tensor:
    if x.is_floating_point():
        return x + 1.2 * torch.randn(x.shape, generator=generator)
    if x.dtype == torch.bool:
        return x
    return torch.where(torch.rand(x.shape, generator=generator) < 0.6, x.roll(1, 0), x)


def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Off the default initialisation, which hides errors behind zeros and ones; running statistics too."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not isinstance(parameter, nn.parameter.UninitializedParameter):
                parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", ".mean")):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            if name.endswith(("running_var", ".var")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(16, *shape, generator=g)


def tokens(vocabulary: int, length: int, *, low: int = 0) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(low, vocabulary, (16, length), generator=g)


def _text(g: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(0, 9, (16, 6), generator=g)
    ids[:, 0] = 1 + ids[:, 0] % 8
    mask = torch.rand(16, 6, generator=g) < 0.8
    mask[:, 0] = True
    # Between the tensors, what transformers' models are called with.
    constants = {"head_mask": None, "return_dict": True, "scale": 1.0, "pooling": "mean", "dtype": torch.int64}
    return {"input_ids": ids, **constants, "attention_mask": mask}


def _two(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(16, 5, generator=g), torch.randint(4, (16,), generator=g)


class Mean(nn.Module):
    """Average over every axis but batch and channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def cnn(norm: Callable[[int], nn.Module], *, conv: Callable[..., nn.Module] = nn.Conv2d) -> nn.Sequential:
    """Two convolutions with a norm after each."""
    first, second = conv(3, 4, 3, padding=1), conv(4, 4, 3, stride=2)
    return nn.Sequential(first, norm(4), nn.Tanh(), second, norm(4), nn.Softplus(), Mean(), nn.Linear(4, 3))


def conv_stack(*middle: nn.Module, channels: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), *middle, nn.Tanh(), Mean(), nn.Linear(channels, 3))


def mlp(activation: Callable[[], nn.Module] = nn.Tanh, *extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), activation(), *extra, nn.Linear(8, 6), activation(), nn.Linear(6, 3))


def wrn_slice() -> nn.Sequential:
    blocks = [models.WideBlock(4, 4, 1), models.WideBlock(4, 6, 2)]
    tail = [nn.BatchNorm2d(6), nn.LeakyReLU(0.1, inplace=True), Mean(), nn.Linear(6, 3)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), *blocks, *tail)


def _two_names() -> nn.Module:
    """One module under two names, as T5 and many others register their embedding."""
    layer = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    return nn.Sequential(nn.Linear(5, 6), layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3))


def _mixed_modes(model: nn.Module) -> None:
    model[1].eval()  # type: ignore[index]


def _freeze_stem(model: nn.Module) -> None:
    model[0].requires_grad_(False)  # type: ignore[index]
    model[2].weight.requires_grad_(False)  # type: ignore[index]


def _weight_norm() -> nn.Module:
    model = mlp()
    parametrizations.weight_norm(model[0])
    parametrizations.weight_norm(model[2], dim=1)
    return nn.Sequential(model, nn.Identity())


def weight_norm_by_hand(model: nn.Module, tape: Tape) -> None:
    """Torch's second derivative of weight_norm is wrong; v (g / |v|) written out is right."""
    for layer in model.modules():
        if parametrize.is_parametrized(layer, "weight"):
            own = layer.parametrizations.weight[0]  # type: ignore[union-attr,index]
            own.forward = lambda g, v, dim=own.dim: (
                v * (g / v.square().sum([other for other in range(v.dim()) if other != dim], keepdim=True).sqrt())
            )


def _spectral_norm() -> nn.Module:
    model = mlp()
    parametrizations.spectral_norm(model[0])
    return model


def _fused_norm_by_hand(model: nn.Module, tape: Tape) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, models.FusedNormAct):
            layer.forward = lambda x, name=name, layer=layer: F.silu(tape.normalize(name, layer, x))


class _AsLayer:
    """What `Tape.normalize` asks of a layer, for a module that keeps its statistics under other names."""

    def __init__(self, module: models.FunctionalNorm) -> None:
        self.running_mean, self.running_var, self.eps = module.mean, module.var, 1e-5
        self.weight, self.bias, self.training = module.gain, module.shift, module.training


def _functional_norm_by_hand(model: nn.Module, tape: Tape) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, models.FunctionalNorm):
            layer.forward = lambda x, name=name, layer=layer: tape.normalize(name, _AsLayer(layer), x)


def _sync_norm() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(cnn(nn.BatchNorm2d))


def _user_hooks(model: nn.Module) -> None:
    model[0].register_forward_hook(lambda module, args, output: 1.5 * output)  # type: ignore[index]
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))  # type: ignore[index]


def _channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    onehot = (target[:, None] == torch.arange(3, device=target.device)).to(output.dtype)
    return (torch.softmax(output, 1) - onehot).square().sum(1)


def _with_one_hot(output: Tensor, target: Tensor) -> Tensor:
    """F.one_hot looks at the values of its input, which vmap does not allow."""
    return -(F.one_hot(target, 3) * torch.log_softmax(output, 1)).sum(1)


IMAGE = normal(3, 6, 6)
VECTOR = normal(5)

_TABLE = [
    Case("mlp", mlp, VECTOR),
    Case("mlp_soft_target", mlp, VECTOR, soft=True),
    Case("mlp_inplace_relu", lambda: mlp(lambda: nn.ReLU(inplace=True)), VECTOR),
    Case("mlp_layernorm", lambda: mlp(nn.GELU, nn.LayerNorm(8)), VECTOR),
    Case("mlp_rmsnorm", lambda: mlp(nn.SiLU, nn.RMSNorm(8, eps=1e-5)), VECTOR),
    Case("mlp_batchnorm1d", lambda: mlp(nn.Tanh, nn.BatchNorm1d(8)), VECTOR),
    Case("mlp_user_loss", mlp, VECTOR, loss_fn=_squared_error),
    Case("mlp_user_loss_one_hot", mlp, VECTOR, loss_fn=_with_one_hot, vmap="refused"),
    Case("mlp_user_hooks", mlp, VECTOR, prepare=_user_hooks),
    Case("mlp_encoder", mlp, VECTOR, encoder=lambda name: not name.startswith("4.")),
    Case("cnn_batchnorm_train", lambda: cnn(nn.BatchNorm2d), IMAGE),
    Case("cnn_batchnorm_eval", lambda: cnn(nn.BatchNorm2d), IMAGE, training=False),
    Case("cnn_batchnorm_mixed", lambda: cnn(nn.BatchNorm2d), IMAGE, prepare=_mixed_modes),
    Case("cnn_batchnorm_no_running", lambda: cnn(lambda c: nn.BatchNorm2d(c, track_running_stats=False)), IMAGE),
    Case("cnn_batchnorm_no_running_eval", lambda: cnn(lambda c: nn.BatchNorm2d(c, track_running_stats=False)), IMAGE,
        training=False),
    Case("cnn_batchnorm_cumulative", lambda: cnn(lambda c: nn.BatchNorm2d(c, momentum=None)), IMAGE),
    Case("cnn_batchnorm_no_affine", lambda: cnn(lambda c: nn.BatchNorm2d(c, affine=False)), IMAGE),
    Case("cnn_batchnorm_fused_activation", lambda: cnn(models.FusedNormAct), IMAGE, reference=_fused_norm_by_hand),
    Case("cnn_batchnorm_functional", lambda: cnn(models.FunctionalNorm), IMAGE, reference=_functional_norm_by_hand),
    Case("cnn_batchnorm_twice", models.norm_twice, IMAGE),
    Case("cnn_sync_batchnorm_train", _sync_norm, IMAGE),
    Case("cnn_sync_batchnorm_eval", _sync_norm, IMAGE, training=False),
    Case("cnn_channels_last", lambda: cnn(nn.BatchNorm2d), IMAGE, prepare=_channels_last),
    Case("cnn_groupnorm", lambda: cnn(lambda c: nn.GroupNorm(2, c)), IMAGE),
    Case("cnn_instancenorm", lambda: cnn(lambda c: nn.InstanceNorm2d(c, affine=True)), IMAGE),
    Case("cnn_instancenorm_tracking",
        lambda: cnn(lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True)), IMAGE),
    Case("cnn_instancenorm_tracking_eval",
        lambda: cnn(lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True)), IMAGE, training=False),
    Case("wrn_slice", wrn_slice, IMAGE),
    Case("vit", models.VisionTransformer, IMAGE),
    Case("vit_dropout", lambda: models.VisionTransformer(dropout=0.3), IMAGE),
    Case("attention_functional", models.ScaledDotProduct, normal(4, 4)),
    Case("transformer_layer", lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True),
        nn.Flatten(), nn.Linear(12, 3)), normal(3, 4)),
    Case("transformer_layer_eval", lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2,
        batch_first=True), nn.Flatten(), nn.Linear(12, 3)), normal(3, 4), training=False),
    Case("tied_embedding", models.TiedLanguageModel, tokens(7, 4), classes=7),
    Case("reused_linear", models.reused, VECTOR),
    Case("module_with_two_names", _two_names, VECTOR),
    Case("conv_grouped", lambda: conv_stack(nn.Conv2d(4, 6, 3, groups=2), channels=6), IMAGE),
    Case("conv_dilated", lambda: conv_stack(nn.Conv2d(4, 4, 3, dilation=2, padding=2, padding_mode="circular")), IMAGE),
    Case("conv_depthwise", lambda: conv_stack(nn.Conv2d(4, 8, 3, groups=4), nn.Tanh(), nn.Conv2d(8, 4, 1)), IMAGE),
    Case("conv_transposed", lambda: conv_stack(nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2)), IMAGE),
    Case("conv1d", lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding="same"), nn.Tanh(), nn.Conv1d(4, 4, 2), Mean(),
        nn.Linear(4, 3)), normal(3, 7)),
    Case("conv3d",
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.Tanh(), nn.Conv3d(3, 4, 2, stride=2), Mean(), nn.Linear(4, 3)),
        normal(2, 4, 4, 4)),
    Case("pooling", lambda: conv_stack(nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(1)), IMAGE),
    Case("text_dict", models.TextClassifier, _text),
    Case("two_inputs", models.two_inputs, _two),
    Case("dict_output", models.dict_output, VECTOR),
    Case("dropout", lambda: mlp(nn.Tanh, nn.Dropout(0.5)), VECTOR),
    Case("dropout_functional", models.functional_dropout, VECTOR),
    Case("dropout2d", lambda: conv_stack(nn.Conv2d(4, 4, 3), nn.Dropout2d(0.5)), IMAGE),
    Case("bare_parameters", models.LayerScale, VECTOR),
    Case("frozen_subset", mlp, VECTOR, prepare=_freeze_stem),
    Case("prelu", lambda: mlp(lambda: nn.PReLU(init=0.2)), VECTOR),
    Case("weight_norm", _weight_norm, VECTOR, reference=weight_norm_by_hand),
    Case("spectral_norm_eval", _spectral_norm, VECTOR, training=False, randomize=False),
    # Moved weights, as after some training: the power iteration has not converged, and every call moves it on.
    Case("spectral_norm_train", _spectral_norm, VECTOR),
    Case("running_centre", lambda: models.WithMemory(models.RunningCentre, twice=False), VECTOR, vmap="refused"),
    Case("moving_codebook", lambda: models.WithMemory(models.Codebook, twice=False), VECTOR, vmap="refused"),
    Case("write_through_data", lambda: models.WithMemory(models.ThroughData), VECTOR, vmap="refused"),
    Case("unregistered_memory", lambda: models.WithMemory(models.Unregistered), VECTOR, vmap="refused"),
    Case("history", lambda: models.WithMemory(models.History), VECTOR),
    Case("history_one_by_one", lambda: models.WithMemory(models.PickyHistory), VECTOR),
    Case("gru", lambda: models.recurrent(nn.GRU), normal(3, 4), vmap="refused"),
    Case("lstm", lambda: models.recurrent(nn.LSTM), normal(3, 4), vmap="refused"),
    Case("checkpointed", models.checkpointed, VECTOR),
    Case("data_dependent", models.data_dependent, VECTOR, vmap="refused", ghost="refused"),
]  # fmt: skip

CASES: dict[str, Case] = {case.name: case for case in _TABLE}
