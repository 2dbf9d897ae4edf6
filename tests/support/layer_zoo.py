"""The second zoo: rows for single layers and for the ways in which their parameters are used.

The rows of `zoo` are run by every test of every engine; these are for the rules of the ghost engine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from . import layer_models as models
from .zoo import VECTOR, Case, Mean, conv_stack, mlp, normal, tokens, weight_norm_by_hand

OBLONG = normal(3, 5, 4)
SEQUENCE = normal(3, 4)


def stack1d(layer: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 2), nn.Tanh(), layer, nn.Tanh(), Mean(), nn.Linear(channels, 3))


def stack3d(layer: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 1), nn.Tanh(), layer, nn.Tanh(), Mean(), nn.Linear(channels, 3))


def conv2d(name: str, channels: int, *args: object, **options: object) -> Case:
    return Case(
        f"conv2d_{name}", lambda: conv_stack(nn.Conv2d(4, channels, *args, **options), channels=channels), OBLONG
    )


def transposed2d(name: str, channels: int, *args: object, **options: object) -> Case:
    layer = lambda: nn.ConvTranspose2d(4, channels, *args, **options)  # noqa: E731
    return Case(f"transposed2d_{name}", lambda: conv_stack(layer(), channels=channels), OBLONG)


def after(name: str, layer: Callable[[], nn.Module], outputs: int, inputs: Callable[..., Tensor] = VECTOR) -> Case:
    """A layer on features of width 6."""
    return Case(name, lambda: models.Network(layer(), inputs(torch.Generator()).shape[-1], 6, outputs), inputs)


def recurrent(name: str, kind: type[nn.RNNBase], **options: object) -> Case:
    return Case(name, lambda: models.Recurrence(kind, **options), SEQUENCE, vmap="refused")


def _context(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    padded = torch.rand(16, 4, generator=g) < 0.4
    padded[:, 0] = False
    return torch.randn(16, 2, 4, generator=g), torch.randn(16, 4, 4, generator=g), padded


def _attention(name: str, **options: object) -> Case:
    return Case(f"attention_{name}", lambda: models.CrossAttention(**options), _context)


def _then_in_place(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.LeakyReLU(0.2, inplace=True))


def _no_shift(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight) * norm.bias.exp().mean()


def _weight_norm_conv() -> nn.Module:
    model = conv_stack(nn.Conv2d(4, 4, 2, padding=1))
    parametrizations.weight_norm(model[2])
    return model


def _freeze_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("0.", "2.")) or name.endswith("bias"))


def _freeze_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("bias"))


def _unbatched(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([layer(image.T.unsqueeze(0)) for image in x]).flatten(2).transpose(1, 2)


def _bilinear(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.to(layer.weight.dtype)  # torch's nn.Bilinear raises under autocast if its input is in half precision
    return layer(x, x.sin())


def _folded(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])


def _twice(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(torch.tanh(layer(x))[:, :, 1:])


_TABLE = [
    conv2d("stride_bias", 5, 3, stride=2, padding=1),
    conv2d("valid", 5, 2, padding="valid"),
    conv2d("same", 5, 3, padding="same"),
    conv2d("same_even", 4, (2, 4), padding="same"),
    conv2d("same_even_dilated", 4, 2, padding="same", dilation=(1, 3), groups=2),
    conv2d("same_dilated", 4, 3, padding="same", dilation=2),
    conv2d("circular", 4, 3, padding=1, padding_mode="circular"),
    conv2d("circular_same_even", 4, (2, 3), padding="same", padding_mode="circular"),
    conv2d("reflect", 4, (3, 2), padding=(2, 1), padding_mode="reflect", bias=False),
    conv2d("replicate", 4, 2, padding=1, padding_mode="replicate", stride=(1, 2)),
    conv2d("mixed", 6, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2),
    conv2d("stride_beyond_kernel", 4, 2, stride=3, groups=4),
    conv2d("dilated_groups", 6, (3, 2), padding=(2, 1), dilation=2, groups=2),
    conv2d("1x1", 6, 1),
    conv2d("1x1_padded", 4, 1, padding=(1, 2)),
    conv2d("1x1_stride", 4, 1, stride=2, bias=False),
    conv2d("kernel_2", 4, 2, padding=1),
    conv2d("oblong_kernel", 5, (3, 1), padding=(2, 1)),
    conv2d("padding_beyond_kernel", 4, 2, padding=3),
    conv2d("kernel_of_the_image", 5, (5, 4)),
    conv2d("depthwise", 8, 3, padding=1, groups=4),
    transposed2d("plain", 5, 2),
    transposed2d("stride_1_padded", 4, 3, padding=2),
    transposed2d("output_padding", 6, 3, stride=2, padding=1, output_padding=(1, 0), groups=2, dilation=(2, 1)),
    transposed2d("depthwise", 8, (2, 3), stride=(1, 2), groups=4, bias=False),
    Case("conv1d_mixed", lambda: stack1d(nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2), 6), normal(3, 7)),
    Case("conv1d_same_even", lambda: stack1d(nn.Conv1d(4, 4, 4, padding="same"), 4), normal(3, 7)),
    Case("conv1d_stride", lambda: stack1d(nn.Conv1d(4, 4, 3, stride=2, padding_mode="reflect"), 4), normal(3, 7)),
    Case("transposed1d", lambda: stack1d(nn.ConvTranspose1d(4, 4, 3, 2, 1, 1, groups=2), 4), normal(3, 5)),
    Case("conv3d_mixed", lambda: stack3d(nn.Conv3d(4, 4, (1, 2, 3), 1, (0, 1, 1), groups=2), 4), normal(2, 2, 3, 3)),
    Case("conv3d_stride", lambda: stack3d(nn.Conv3d(4, 5, 2, (1, 2, 1), dilation=(1, 1, 2)), 5), normal(2, 2, 3, 3)),
    Case("transposed3d", lambda: stack3d(nn.ConvTranspose3d(4, 4, 2, 2, 1, (0, 1, 0), 2), 4), normal(2, 2, 3, 2)),
    Case("frames", models.frames, normal(2, 3, 4, 5)),
    Case("sequence_first", models.sequence_first, SEQUENCE),
    after("unbatched_conv", lambda: models.Apply(nn.Conv2d(1, 4, 2, padding=1), _unbatched), 4, SEQUENCE),
    after("linear_folded", lambda: models.Apply(nn.Linear(6, 5), _folded), 5, SEQUENCE),
    after("linear_3d", lambda: nn.Linear(6, 5), 5, SEQUENCE),
    after("linear_4d_no_bias", lambda: nn.Linear(6, 5, bias=False), 5, normal(2, 3, 4)),
    after("linear_5d", lambda: nn.Linear(6, 2), 2, normal(2, 1, 2, 4)),
    after("linear_one_feature", lambda: nn.Linear(6, 1), 1, SEQUENCE),
    after("bilinear", lambda: models.Apply(nn.Bilinear(6, 6, 4), _bilinear), 4),
    after("prelu_channels", lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(4, init=0.3)), 4),
    after("glu", lambda: nn.Sequential(nn.Linear(6, 8), nn.GLU()), 4, SEQUENCE),
    Case("conv_twice", lambda: stack1d(models.Apply(nn.Conv1d(4, 4, 2, padding=1), _twice), 4), normal(3, 6)),
    Case("text_padding", lambda: models.Text(0, tied=False), tokens(7, 6), classes=7),
    Case("text_negative_padding_tied", lambda: models.Text(-2, tied=True), tokens(7, 6), classes=7),
    Case("shared", models.shared, VECTOR),
    Case("bare_and_ruled", models.Bare, normal(3, 4, 4)),
    Case("generated_kernels", models.Generated, normal(3, 4, 6)),
    Case("functional_weights", models.Functional, VECTOR),
    Case("in_place", models.InPlace, OBLONG),
    Case("groupnorm_in_place", lambda: conv_stack(_then_in_place(nn.GroupNorm(2, 4, affine=False))), OBLONG),
    Case("instancenorm_in_place", lambda: conv_stack(_then_in_place(nn.InstanceNorm2d(4))), OBLONG),
    Case("groupnorm_weight", lambda: conv_stack(models.Apply(nn.GroupNorm(4, 4), _no_shift)), OBLONG),
    after("layernorm_in_place", lambda: _then_in_place(nn.LayerNorm((3, 6), elementwise_affine=False)), 6, SEQUENCE),
    after("layernorm_2d", lambda: nn.LayerNorm((3, 6)), 6, SEQUENCE),
    Case("idle", models.Idle, VECTOR),
    Case("basic_block", lambda: nn.Sequential(models.BasicBlock(3, 4, 2), Mean(), nn.Linear(4, 3)), normal(3, 4, 4)),
    Case("squeeze_excite", lambda: conv_stack(models.squeeze_excite(4)), OBLONG),
    Case("weight_norm_conv", _weight_norm_conv, OBLONG, reference=weight_norm_by_hand),
    Case("frozen_weights", lambda: conv_stack(nn.Conv2d(4, 4, 2)), OBLONG, prepare=_freeze_weights),
    Case("frozen_biases", lambda: conv_stack(nn.ConvTranspose2d(4, 4, 2)), OBLONG, prepare=_freeze_biases),
    Case("only_biases", lambda: conv_stack(nn.Conv2d(4, 4, 2)), OBLONG, encoder=lambda name: name.endswith("bias")),
    Case("mlp_only_weights", mlp, VECTOR, encoder=lambda name: name.endswith("weight")),
    _attention("cross", kdim=3, vdim=5),
    _attention("bias_kv", add_bias_kv=True, averaged=True),
    _attention("zero_attn", add_zero_attn=True, kdim=6, bias=False),
    recurrent("lstm_projected", nn.LSTM, proj_size=3, batch_first=True, initial=True),
    recurrent("lstm_deep", nn.LSTM, num_layers=2, bidirectional=True, dropout=0.5),
    recurrent("lstm_projected_no_bias", nn.LSTM, proj_size=2, bias=False, bidirectional=True, num_layers=2),
    recurrent("gru_deep", nn.GRU, num_layers=2, bidirectional=True, batch_first=True, initial=True),
    recurrent("gru_no_bias", nn.GRU, bias=False),
    recurrent("rnn_tanh", nn.RNN, batch_first=True, initial=True),
    recurrent("rnn_relu", nn.RNN, nonlinearity="relu", bidirectional=True),
    Case("lstm_cell", lambda: models.cell(nn.LSTMCell), SEQUENCE, vmap="refused"),
    Case("gru_cell", lambda: models.cell(nn.GRUCell), SEQUENCE, vmap="refused"),
]

LAYER_CASES: dict[str, Case] = {case.name: case for case in _TABLE}
assert len(LAYER_CASES) == len(_TABLE), "two rows have one name"
