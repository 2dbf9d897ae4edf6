"""The models of the benchmarks, in plain torch.nn, each an `encoder` whose gradients are compared and a `head`.

wrn-28-2, wrn-D-W         the trainers' wide residual network (BatchNorm), 32x32
wrn-28-2-gn, wrn-D-W-gn   the same with GroupNorm
resnet-18, resnet-50      He et al. (2016) with the stem for photographs, at any size
vit-tiny                  32x32 in patches of 4, 192 features, 12 blocks of 3 heads, class token and positions
vit-tiny-table            the same with positions as nn.Embedding and the mean in place of the class token: no bare
                          parameter, as hook-based libraries need it
cnn                       four convolutions with ReLU, no normalisation: in the scope of every peer
mlp                       784-256-256-10
bilstm                    two bidirectional LSTM layers of 64, over the 28 rows of 28 numbers
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from trainer.models import build_model  # the trainers' WRN, on the path since the line above

CLASSES = 10


class Classifier(nn.Module):
    """An encoder `[B, ...] -> [B, features]` and a linear head."""

    def __init__(self, encoder: nn.Module, features: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K]."""
        return self.head(self.encoder(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.shortcut = _shortcut(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W']."""
        return F.relu(self.body(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, as is usual since ResNet v1.5), 1x1 to four times the width."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.shortcut = _shortcut(channels_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W']."""
        return F.relu(self.body(x) + self.shortcut(x))


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    if channels_in == channels_out and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))


def resnet(block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, ...]) -> Classifier:
    """ResNet with the 7x7 stem."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    channels = 64
    for group, count in enumerate(blocks):
        for position in range(count):
            width = 64 * 2**group
            layers.append(block(channels, width, 2 if group and not position else 1))
            channels = width * block.expansion
    return Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels)


class Attention(nn.Module):
    """Multi-head self-attention on [B, T, D]."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to the same."""
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a perceptron of four times the width, each normalised before and added."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.attention = Attention(features, heads)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionEncoder(nn.Module):
    """Dosovitskiy et al. (2021): patches, positions, transformer blocks, one vector an image.

    Args:
        table: positions in an `nn.Embedding` and the mean over patches; else a bare parameter and a class token.
    """

    def __init__(self, *, table: bool, size: int = 32, patch: int = 4, features: int = 192, depth: int = 12) -> None:
        super().__init__()
        patches = (size // patch) ** 2
        self.patches = nn.Conv2d(3, features, patch, patch)
        self.table = nn.Embedding(patches, features) if table else None
        if not table:
            self.token = nn.Parameter(0.02 * torch.randn(1, 1, features))
            self.positions = nn.Parameter(0.02 * torch.randn(1, patches + 1, features))
        self.blocks = nn.Sequential(*(TransformerBlock(features, heads=3) for _ in range(depth)))
        self.norm = nn.LayerNorm(features)

    def forward(self, x: Tensor) -> Tensor:
        """Images to features [B, D]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.table is not None:
            ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            return self.norm(self.blocks(x + self.table(ids))).mean(1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.norm(self.blocks(x + self.positions))[:, 0]


def cnn() -> Classifier:
    """Convolutions and ReLU only."""
    sizes = [(3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)]
    layers: list[nn.Module] = []
    for channels_in, channels_out, stride in sizes:
        layers += [nn.Conv2d(channels_in, channels_out, 3, stride, 1), nn.ReLU()]
    return Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128)


def mlp() -> Classifier:
    """Two hidden layers of 256."""
    return Classifier(nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()), 256)


class Rows(nn.Module):
    """A recurrent network over the rows of an image, and the mean over its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(28, 64, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors of 784 to features [B, 128]."""
        return self.layers(x.unflatten(1, (28, 28)))[0].mean(1)


@dataclass(frozen=True)
class Spec:
    """How a model is built, and the inputs that it takes."""

    build: Callable[[], nn.Module]
    image_size: int | None = 32  # None: vectors of 784

    def shape(self, image_size: int | None = None) -> tuple[int, ...]:
        """Of one input; `image_size` other than the usual one where given."""
        if self.image_size is None:
            return (784,)
        side = image_size or self.image_size
        return (3, side, side)


_SPECS = {
    "resnet-18": Spec(lambda: resnet(BasicBlock, (2, 2, 2, 2)), 64),
    "resnet-50": Spec(lambda: resnet(Bottleneck, (3, 4, 6, 3)), 224),
    "vit-tiny": Spec(lambda: Classifier(VisionEncoder(table=False), 192)),
    "vit-tiny-table": Spec(lambda: Classifier(VisionEncoder(table=True), 192)),
    "cnn": Spec(cnn),
    "mlp": Spec(mlp, None),
    "bilstm": Spec(lambda: Classifier(Rows(), 128), None),
}


def spec(name: str) -> Spec:
    """The model of that name; initialised from torch's global generator when built."""
    if name in _SPECS:
        return _SPECS[name]
    return Spec(lambda: build_model(name, CLASSES, momentum=0.1))


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a sample's output depends on its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
