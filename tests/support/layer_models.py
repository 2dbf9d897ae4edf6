"""Networks around single layers, each with one way of using a parameter that a layer rule can get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import Layers


class Network(nn.Module):
    """A linear stem, `middle` on its output, a linear head on whatever comes back, averaged over positions."""

    def __init__(self, middle: nn.Module, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(inputs, width), middle, nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.middle(torch.tanh(self.stem(x))))
        return self.head(y.flatten(1, -2).mean(1) if y.dim() > 2 else y)


class Apply(nn.Module):
    """A layer and what is done with it."""

    def __init__(self, layer: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def frames() -> Layers:
    """Video: a sample's frames are folded into the batch, [B, T, 3, H, W] -> [B T, 3, H, W]."""

    def forward(m: Any, x: Tensor) -> Tensor:
        each = torch.relu(m.norm(m.first(x.flatten(0, 1))))
        features = m.mix(torch.tanh(m.second(each)).mean((2, 3)))  # [B T, 5]
        return m.head(torch.tanh(features.unflatten(0, x.shape[:2])).mean(1))

    layers = {"first": nn.Conv2d(3, 4, 3, padding=1), "second": nn.Conv2d(4, 4, 2, stride=2)}
    return Layers(forward, **layers, norm=nn.BatchNorm2d(4), mix=nn.Linear(4, 5), head=nn.Linear(5, 3))


def sequence_first() -> Layers:
    """[T, B, D] inside, as the classical recurrent and attention layers take it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(m.stem(x.transpose(0, 1)))
        y = y + m.attention(y, y, y, need_weights=False)[0]
        y = torch.tanh(m.convolution(y.permute(1, 2, 0)))  # [B, D, T - 1]
        return m.head(y.permute(2, 0, 1)).mean(0)

    layers = {"stem": nn.Linear(4, 6), "attention": nn.MultiheadAttention(6, 2), "head": nn.Linear(6, 3)}
    return Layers(forward, **layers, convolution=nn.Conv1d(6, 6, 2))


class CrossAttention(nn.Module):
    """Queries of one sequence, keys and values of others, some of them masked."""

    def __init__(self, *, averaged: bool = False, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)
        self.query, self.key = nn.Linear(4, 6), nn.Linear(4, self.attention.kdim)
        self.value, self.head = nn.Linear(4, self.attention.vdim), nn.Linear(6, 3)
        self.averaged = averaged

    def forward(self, x: Tensor, context: Tensor, padded: Tensor) -> Tensor:
        q, k, v = torch.tanh(self.query(x)), torch.tanh(self.key(context)), torch.tanh(self.value(context))
        y, weights = self.attention(q, k, v, key_padding_mask=padded, need_weights=self.averaged)
        y = y if weights is None else y * weights.square().sum((1, 2))[:, None, None]
        return self.head(torch.tanh(y).mean(1))


class Recurrence(nn.Module):
    """A recurrent layer of any options, with a learned initial state if asked for."""

    def __init__(self, kind: type[nn.RNNBase], *, initial: bool = False, **options: object) -> None:
        super().__init__()
        self.rnn = kind(4, 5, **options)
        size = self.rnn.proj_size or 5
        directions = 2 if self.rnn.bidirectional else 1
        self.head = nn.Linear(directions * size, 3)
        self.initial = None
        if initial:
            states = [nn.Parameter(0.3 * torch.randn(directions * self.rnn.num_layers, 1, n)) for n in (size, 5)]
            self.initial = nn.ParameterList(states if kind is nn.LSTM else states[:1])

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 4]
        state = None
        if self.initial is not None:
            expanded = tuple(part.expand(-1, len(x), -1).contiguous() for part in self.initial)
            state = expanded if len(expanded) == 2 else expanded[0]
        output, last = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1), state)
        output = output if self.rnn.batch_first else output.transpose(0, 1)
        last = last[1] if isinstance(last, tuple) else last
        return self.head(output).square().mean(1) + last.sum((0, 2))[:, None] * output.mean((1, 2))[:, None]


def cell(kind: type[nn.RNNCellBase]) -> Layers:
    """A recurrence written as a loop over a cell."""

    def forward(m: Any, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = m.cell(step, state)
        return m.head(state[0] if isinstance(state, tuple) else state)

    return Layers(forward, cell=kind(4, 5), head=nn.Linear(5, 3))


class Text(nn.Module):
    """Token embedding with a padding index, position embedding of a constant range, a head tied to the tokens."""

    def __init__(self, padding: int, *, tied: bool) -> None:
        super().__init__()
        self.token, self.position, self.padding = nn.Embedding(7, 5), nn.Embedding(6, 5), padding
        self.hidden, self.head = nn.Linear(5, 5), nn.Linear(5, 7)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        # The module would make a negative index positive; the function takes it as it is.
        x = F.embedding(ids, self.token.weight, self.padding) + self.position(torch.arange(ids.shape[1]))
        return self.head(torch.tanh(self.hidden(torch.tanh(x))).mean(1))


def shared() -> Layers:
    """Two layers with one weight and one bias between them, in every combination."""
    forward = lambda m, x: m.head(torch.tanh(m.b(torch.tanh(m.a(torch.tanh(m.stem(x)))))))  # noqa: E731
    layers = {"stem": nn.Linear(5, 6), "a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "head": nn.Linear(6, 3)}
    made: Any = Layers(forward, **layers)
    made.b.weight, made.b.bias = made.a.weight, made.stem.bias
    return made


class Bare(nn.Module):
    """Weights that layers with a rule use, and that are used without one as well."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.convolution(x)).mean((2, 3)) * self.convolution.weight.square().sum()
        y = torch.tanh(self.linear(y)) + y @ self.linear.weight + self.linear.bias.sum()
        return self.head(torch.tanh(y))


class Generated(nn.Module):
    """Convolution kernels that a layer makes: one for all samples from a constant, one of each sample's own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("code", torch.randn(2, 5))
        self.maker, self.own, self.head = nn.Linear(5, 3 * 9), nn.Linear(3, 2 * 4), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.conv2d(x, self.maker(self.code).view(2, 3, 3, 3), self.code[:, 0]))
        kernels = torch.tanh(self.own(x.mean((2, 3)))).view(-1, 2, 2, 2)  # [B, 2, 2, 2]: depthwise, one channel each
        kernels = kernels.reshape(len(x) * 2, 1, 2, 2)
        y = F.conv2d(y.reshape(1, -1, *y.shape[2:]), kernels, groups=len(x) * 2).view(len(x), 2, -1)
        return self.head(torch.tanh(y).mean(2))


class Functional(nn.Module):
    """Weights in the forms that functions take: transposed, normalised, as matrices, in einsum, as vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(0.3 * torch.randn(6, 6)) for _ in range(3))
        self.stem, self.vector, self.head = nn.Linear(5, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(F.linear(x, self.a.t())) + torch.tanh(F.linear(x, F.normalize(self.b, dim=1), self.vector))
        x = torch.addmm(self.vector, x, self.c) + torch.einsum("bi,ij->bj", x, self.c)
        return self.head(torch.tanh(x)) * F.softplus(x @ self.vector)[:, None]


class InPlace(nn.Module):
    """Everything that may be done in place after a layer: activations, residuals, slices, scalings."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.c, self.d, self.head = nn.BatchNorm2d(4), nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.relu, self.leaky = nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        y = self.norm(self.b(x))
        y += x
        y = self.leaky(self.c(self.leaky(y).mean((2, 3))))
        z = self.d(y)
        z[:, 1:3].mul_(0.5)
        z += y
        return self.head(F.relu_(z))


class Idle(nn.Module):
    """An auxiliary output that the loss ignores, a parameter that nothing uses, a layer whose result is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.auxiliary, self.head = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 3)
        self.unused, self.dropped = nn.Parameter(torch.randn(4)), nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.tanh(self.stem(x))
        self.dropped(y.unsqueeze(1))
        return {"auxiliary": self.auxiliary(y), "logits": self.head(y)}


class BasicBlock(nn.Module):
    """The residual block of ResNet-18, with its in-place ReLU and in-place sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


def squeeze_excite(channels: int) -> Layers:
    """1x1 convolutions of 1x1 images, whose result gates the channels."""
    gate = lambda m, x: m.expand(F.silu(m.reduce(x.mean((2, 3), keepdim=True))))  # noqa: E731
    layers = {"reduce": nn.Conv2d(channels, 2, 1), "expand": nn.Conv2d(2, channels, 1)}
    return Layers(lambda m, x: x * torch.sigmoid(gate(m, x)), **layers)
