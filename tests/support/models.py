"""Modules of the zoo that torch.nn has not got: each with one trait that a per-sample gradient can trip over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class Layers(nn.Module):
    """Any function of a few layers."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


class VisionTransformer(nn.Module):
    """Patches, a class token and positions as bare parameters, one pre-norm block with nn.MultiheadAttention."""

    def __init__(self, width: int = 8, classes: int = 3, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 3, stride=3)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 5, width))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)  # [B, 4, width]
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1) + self.position
        y = self.norm1(tokens)
        tokens = tokens + self.attention(y, y, y, need_weights=False)[0]
        tokens = tokens + self.mlp(self.norm2(tokens))
        return self.head(self.norm(tokens)[:, 0])


class ScaledDotProduct(nn.Module):
    """Calls F.scaled_dot_product_attention itself, as recent transformers do."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 3 * width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 4]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, d]
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


class TiedLanguageModel(nn.Module):
    """The output matrix is the embedding: one parameter, two uses."""

    def __init__(self, vocabulary: int = 7, width: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(self.embedding(tokens).mean(1))))


def reused() -> Layers:
    """One Linear applied twice in a forward."""
    twice = lambda m, x: torch.tanh(m.shared(torch.tanh(m.shared(torch.tanh(m.stem(x))))))  # noqa: E731
    layers = {"stem": nn.Linear(5, 6), "shared": nn.Linear(6, 6), "head": nn.Linear(6, 3)}
    return Layers(lambda m, x: m.head(twice(m, x)), **layers)


class TextClassifier(nn.Module):
    """Keyword arguments, constants among them, a padding index and a mask; an output object that carries logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6, padding_idx=0)
        self.hidden, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        head_mask: None,
        return_dict: bool,
        scale: float,
        pooling: str,
        dtype: torch.dtype,
    ) -> Output:
        assert head_mask is None
        assert return_dict is True
        assert isinstance(scale, float)
        assert pooling == "mean"
        x = torch.tanh(self.hidden(self.embedding(input_ids.to(dtype)))) * attention_mask[..., None]
        return Output(self.head(scale * x.sum(1) / attention_mask.sum(1, keepdim=True)))


@dataclass
class Output:
    """What a transformers-like model returns."""

    logits: Tensor


def dict_output() -> Layers:
    """Returns {"features": ..., "logits": ...}."""

    def forward(m: Any, x: Tensor) -> dict[str, Tensor]:
        features = torch.tanh(m.stem(x))
        return {"features": features, "logits": m.head(features)}

    return Layers(forward, stem=nn.Linear(5, 6), head=nn.Linear(6, 3))


def two_inputs() -> Layers:
    """Two positional arguments, the second an integer table index."""
    layers = {"image": nn.Linear(5, 6), "table": nn.Embedding(4, 6), "head": nn.Linear(6, 3)}
    return Layers(lambda m, x, index: m.head(torch.tanh(m.image(x) + m.table(index))), **layers)


def functional_dropout() -> Layers:
    """Randomness that no module declares."""
    forward = lambda m, x: m.head(F.dropout(torch.tanh(m.stem(x)), 0.5, m.training))  # noqa: E731
    return Layers(forward, stem=nn.Linear(5, 8), head=nn.Linear(8, 3))


class LayerScale(nn.Module):
    """Parameters that belong to no layer with a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale, self.temperature = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x + self.scale * torch.tanh(self.block(x))) * self.temperature


def recurrent(kind: type[nn.RNNBase]) -> Layers:
    """A native recurrent network, its last hidden state classified."""
    return Layers(lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=kind(4, 5, batch_first=True), head=nn.Linear(5, 3))


class WideBlock(nn.Module):
    """Pre-activation block of a wide residual network."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs, momentum=0.001), nn.BatchNorm2d(outputs, momentum=0.001)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.relu = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(x))
        return self.conv2(self.relu(self.bn2(self.conv1(x)))) + self.shortcut(x)


class FusedNormAct(nn.BatchNorm2d):
    """A BatchNorm whose own forward calls F.batch_norm and applies an activation, as timm's BatchNormAct2d does."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.silu(x)


class FunctionalNorm(nn.Module):
    """Calls F.batch_norm with buffers of its own, without being a BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.gain, self.shift, self.training, 0.1, 1e-5)


def norm_twice() -> Layers:
    """One BatchNorm called at two places of a forward: two sets of statistics."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.norm(m.stem(x)))
        return m.head(torch.tanh(m.norm(m.mid(x))).mean((2, 3)))

    convolutions = {"stem": nn.Conv2d(3, 4, 3), "mid": nn.Conv2d(4, 4, 3, padding=1)}
    return Layers(forward, **convolutions, head=nn.Linear(4, 3), norm=nn.BatchNorm2d(4))


def checkpointed() -> Layers:
    """Non-reentrant activation checkpointing around the middle of a network."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(checkpoint(lambda y: torch.tanh(m.mid(y)), torch.tanh(m.stem(x)), use_reentrant=False))

    return Layers(forward, stem=nn.Linear(5, 6), mid=nn.Linear(6, 6), head=nn.Linear(6, 3))


def data_dependent() -> Layers:
    """Control flow on values that are read below Python's methods, which neither vmap nor its engines can follow."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(torch.tanh(x) if torch.ops.aten.item(x.abs().max()) < 1e6 else x)

    return Layers(forward, stem=nn.Linear(5, 6), head=nn.Linear(6, 3))


class SquareOnce(torch.autograd.Function):
    """x^2 with a right first derivative and none of the second order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * upstream


class Remembers(nn.Module):
    """Base of layers that keep something from call to call; `memory` names what is no buffer."""

    memory: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.linspace(-1.0, 1.0, 6))


class RunningCentre(Remembers):
    """Subtracts the centre of all inputs so far, then moves it: a buffer written in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.kept
        with torch.no_grad():
            self.kept.mul_(0.6).add_(x.mean(0), alpha=0.4)
        return y


class ThroughData(Remembers):
    """The same with a write that leaves no version, and a buffer that is assigned to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = x * (1 + 0.2 * self.calls) - self.kept
        self.kept.data.mul_(0.5).add_(x.detach()[0], alpha=0.0)  # vmap refuses it; no sample changes another
        self.calls = self.calls + 1
        return y


class Codebook(Remembers):
    """Nearest code, straight through, and codes that move towards what chose them: VQ-VAE with a moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 6, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            nearest = torch.cdist(x, self.codes).argmin(1)
            chosen = self.codes[nearest]  # before they move, or samples that chose the same code would see each other
            for i, k in enumerate(nearest.tolist()):
                self.codes[k] = 0.7 * self.codes[k] + 0.3 * x[i]
        return 0.5 * x + 0.5 * (x + (chosen - x).detach())


class Unregistered(Remembers):
    """The memory is a tensor that no one registered."""

    memory = ("seen",)

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.linspace(1.0, -1.0, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.seen
        self.seen.mul_(0.5).add_(x.detach()[0], alpha=0.0)
        return y


class History(Remembers):
    """A list of what came before, with its graph, and a number of calls."""

    memory = ("before", "calls")

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = x / self.calls + (0.3 * self.before[-1] if self.before else 0.0)
        self.before.append(x)
        return y


class PickyHistory(History):
    """The same, which looks at its numbers, so that vmap refuses it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.isfinite().all()) else x


class WithMemory(nn.Module):
    """A layer that remembers; used twice in a forward, the second call meets what the first one left."""

    def __init__(self, layer: type[Remembers], *, twice: bool = True) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.layer = layer()
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(torch.tanh(self.layer(self.stem(x))))
        return self.head(torch.tanh(self.layer(h) if self.twice else h))
