"""The fourth zoo: rows for what torch.nn offers beside layers with parameters, and for kernels that are standardised.

Activations, poolings, resizings, reorderings, norms of other dimensions, and the modules that are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer_models import Apply
from .models import Layers
from .oracle import Tape
from .zoo import VECTOR, Case, Mean, conv_stack, mlp, normal, tokens

SQUARE = normal(3, 6, 6)


def activation(layer: Callable[[], nn.Module], *, reference: Callable[[nn.Module, Tape], None] | None = None) -> Case:
    return Case(f"activation_{type(layer()).__name__.lower()}", lambda: mlp(layer), VECTOR, reference=reference)


def between(name: str, layer: Callable[[], nn.Module], channels: int = 4, **options: object) -> Case:
    """Between two convolutions of four channels."""
    build = lambda: conv_stack(layer(), nn.Conv2d(channels, 4, 1))  # noqa: E731
    return Case(name, build, SQUARE, **options)  # type: ignore[arg-type]


def _resize(mode: str, **options: object) -> nn.Module:
    return Apply(nn.Conv2d(4, 4, 2), lambda layer, x: F.interpolate(layer(x), mode=mode, **options))  # type: ignore[arg-type]


def _stack(layer: nn.Module, conv: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(conv(2, 4, 2), layer, nn.Tanh(), conv(4, 4, 1), Mean(), nn.Linear(4, 3))


def _hard_by_hand(model: nn.Module, tape: Tape) -> None:
    """Torch has no second derivative for the fused form."""
    for layer in model.modules():
        if isinstance(layer, nn.Hardsigmoid):
            layer.forward = lambda x: (x / 6 + 0.5).clamp(0, 1)


def _random_slopes_off(model: nn.Module, tape: Tape) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.RReLU):
            layer.eval()


class StandardisedConv(nn.Conv2d):
    """Each kernel with mean 0 and variance 1, by a BatchNorm call on the parameter, as timm writes it."""

    by_hand = False

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand:
            centered = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            weight = centered / (centered.square().mean((1, 2, 3), keepdim=True) + 1e-6).sqrt()
        else:
            row = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(row, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


class StandardisedColumns(nn.Linear):
    """Each input's weights with mean 0 and variance 1: the rows of the call are outputs, not samples."""

    by_hand = False

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand:
            centered = self.weight - self.weight.mean(0)
            return F.linear(x, centered / (centered.square().mean(0) + 1e-5).sqrt(), self.bias)
        return F.linear(x, F.batch_norm(self.weight, None, None, training=True), self.bias)


def _standardised_by_hand(model: nn.Module, tape: Tape) -> None:
    for layer in model.modules():
        if isinstance(layer, StandardisedConv | StandardisedColumns):
            layer.by_hand = True


def _columns() -> nn.Module:
    # Ten outputs: as many as five pairs have views, so that the size alone does not tell them from samples.
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), StandardisedColumns(8, 10), nn.Tanh(), nn.Linear(10, 3))


class Bag(nn.Module):
    """Mean of embeddings."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4) if not options else nn.Embedding(7, 4, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bag(ids)
        return self.head(torch.tanh(x if x.dim() == 2 else x.mean(1)))


def decoder() -> Layers:
    """Cross-attention between two sequences."""

    def forward(m: Any, x: Tensor, memory: Tensor) -> Tensor:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return m.head(m.layer(x, memory, tgt_mask=causal).mean(1))

    return Layers(
        forward, layer=nn.TransformerDecoderLayer(4, 2, 8, dropout=0.2, batch_first=True), head=nn.Linear(4, 3)
    )


class Products(nn.Module):
    """Weights as right factors, as in GPT-2; one of them also in a linear layer, which takes its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.wide, self.head = (nn.Parameter(torch.randn(4, size) / 2) for size in (4, 6, 3))
        self.shift = nn.Parameter(torch.randn(6))
        self.back, self.named = nn.Parameter(torch.randn(6, 4) / 2), nn.Parameter(torch.randn(4, 4) / 2)
        self.level, self.base = (nn.Parameter(torch.randn(1)) for _ in range(2))  # one number for all outputs

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.square)
        h = torch.tanh(F.linear(h, self.square, self.level) + torch.matmul(h, self.square))
        h = torch.tanh(torch.addmm(self.shift, h.flatten(0, 1), self.wide)).view(*h.shape[:2], -1)
        h = torch.tanh(torch.addmm(self.base, h.mean(1), self.back))
        h = torch.tanh(torch.mm(h, mat2=self.named)) + torch.matmul(input=h, other=self.named)
        return torch.mm(torch.tanh(h), self.head)


def force() -> Layers:
    """The gradient of a function for the input, as in a force field, by transforms inside the model."""
    inside = torch.func.vmap(torch.func.grad(lambda z: torch.sin(z).prod()))
    return Layers(
        lambda m, x: m.head(torch.tanh(m.energy(x)) + inside(x)), energy=nn.Linear(5, 5), head=nn.Linear(5, 3)
    )


def _sequences(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(16, 3, 4, generator=g), torch.randn(16, 2, 4, generator=g)


_ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.CELU, nn.ELU, nn.SELU, nn.GELU, lambda: nn.GELU("tanh"), nn.Hardshrink, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.SiLU, lambda: nn.Softmin(1), nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanhshrink, lambda: nn.Threshold(0.1, 0.0), lambda: nn.Softmax(1), lambda: nn.LogSoftmax(1),
]  # fmt: skip


def _renamed(case: Case, name: str) -> Case:
    return Case(name, case.build, case.inputs, reference=case.reference)


_TABLE = [
    *(activation(layer) for layer in _ACTIVATIONS if layer not in (_ACTIVATIONS[4],)),
    _renamed(activation(_ACTIVATIONS[4]), "activation_gelu_tanh"),
    activation(nn.Hardsigmoid, reference=_hard_by_hand),
    Case("activation_rrelu", lambda: mlp(nn.RReLU), VECTOR, reference=_random_slopes_off, vmap="refused"),
    Case("activation_hardsigmoid_inplace", lambda: mlp(lambda: nn.Hardsigmoid(inplace=True)), VECTOR,
         reference=_hard_by_hand),
    _renamed(activation(lambda: nn.Hardswish(inplace=True)), "activation_hardswish_inplace"),
    _renamed(activation(lambda: nn.SiLU(inplace=True)), "activation_silu_inplace"),
    _renamed(activation(lambda: nn.LeakyReLU(0.1, inplace=True)), "activation_leakyrelu_inplace"),
    between("pool_max", lambda: nn.MaxPool2d(3, 2, 1)),
    between("pool_max_dilated", lambda: nn.MaxPool2d(2, 1, dilation=2, ceil_mode=True)),
    between("pool_average_padded", lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    between("pool_power", lambda: nn.LPPool2d(2, 2)),
    between("pool_adaptive_max", lambda: nn.AdaptiveMaxPool2d((3, 2))),
    between("pool_adaptive_average", lambda: nn.AdaptiveAvgPool2d((3, 2))),
    between("resize_nearest", lambda: _resize("nearest", scale_factor=2)),
    between("resize_bilinear", lambda: _resize("bilinear", size=(7, 9), align_corners=False)),
    between("resize_bicubic", lambda: _resize("bicubic", scale_factor=1.5)),
    between("resize_area", lambda: _resize("area", size=3)),
    between("pad_reflect", lambda: nn.ReflectionPad2d((1, 2, 0, 1))),
    between("pad_circular", lambda: nn.CircularPad2d(2)),
    between("pad_replicate", lambda: nn.ReplicationPad2d(1)),
    between("shuffle_pixels", lambda: nn.PixelShuffle(2), channels=1),
    between("shuffle_channels", lambda: nn.ChannelShuffle(2)),
    between("norm_local_response", lambda: nn.LocalResponseNorm(3)),
    between("norm_group_plain", lambda: nn.GroupNorm(2, 4, affine=False)),
    between("norm_instance_plain", lambda: nn.InstanceNorm2d(4)),
    between("norm_layer_map", lambda: nn.LayerNorm([4, 6, 6])),
    between("norm_layer_no_bias", lambda: nn.LayerNorm([6], bias=False)),
    Case("norm_batch3d", lambda: _stack(nn.BatchNorm3d(4), nn.Conv3d), normal(2, 3, 3, 3)),
    Case("norm_instance3d", lambda: _stack(nn.InstanceNorm3d(4, affine=True), nn.Conv3d), normal(2, 3, 3, 3)),
    Case("norm_instance1d", lambda: _stack(nn.InstanceNorm1d(4, affine=True), nn.Conv1d), normal(2, 7)),
    Case("norm_batch1d_sequence", lambda: _stack(nn.BatchNorm1d(4), nn.Conv1d), normal(2, 7)),
    between("unfold_fold", lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Fold((6, 6), 2, stride=2))),
    Case("standardised_kernels", lambda: conv_stack(StandardisedConv(4, 4, 2)), SQUARE,
         reference=_standardised_by_hand),
    Case("standardised_columns", _columns, VECTOR, reference=_standardised_by_hand),
    Case("matrix_products", Products, normal(3, 4)),
    Case("gradient_inside", force, VECTOR),
    Case("transformer_decoder", decoder, _sequences),
    Case("embedding_bag", Bag, tokens(7, 4), vmap="refused", ghost="refused"),
    Case("embedding_max_norm", lambda: Bag(max_norm=1.0), tokens(7, 4), vmap="refused", ghost="refused"),
    Case("embedding_by_frequency", lambda: Bag(scale_grad_by_freq=True), tokens(7, 4), vmap="refused", ghost="refused"),
]  # fmt: skip

OPERATOR_CASES: dict[str, Case] = {case.name: case for case in _TABLE}
REFUSED = {
    "embedding_bag": "EmbeddingBag", "embedding_max_norm": "max_norm", "embedding_by_frequency": "scale_grad_by_freq",
}  # fmt: skip
"""Rows that every engine refuses, the loop included, with a word of the refusal."""
assert len(OPERATOR_CASES) == len(_TABLE), "two rows have one name"
