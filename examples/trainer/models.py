"""Wide residual networks for small images, with the encoder and the classifier head as two named parts.

Index letters: B batch, C channels, H and W image sides, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor, nn

from trainer.errors import OptionError

GROUP_NORM = "-gn"
_NEGATIVE_SLOPE = 0.1


class ResidualBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions: `x + conv2(act(bn2(conv1(act(bn1(x))))))`.

    Where the shape changes, the shortcut is a 1x1 convolution. The first block of the network activates its
    input before *both* paths, as the reference network of the FixMatch line of work does.

    Args:
        channels_in: Channels of the input `[B, C, H, W]`.
        channels_out: Channels of the output.
        stride: Stride of the first convolution (and of the shortcut).
        momentum: Momentum of the running statistics, in torch's sense (weight of the new value).
        activate_shortcut: Whether the shortcut sees the activated input.
    """

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, momentum: float, *, activate_shortcut: bool = False
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in, momentum=momentum)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out, momentum=momentum)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.act = nn.LeakyReLU(_NEGATIVE_SLOPE)
        same_shape = channels_in == channels_out and stride == 1
        self.shortcut = nn.Identity() if same_shape else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
        self.activate_shortcut = activate_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, channels_in, H, W]` to `[B, channels_out, H / stride, W / stride]`."""
        h = self.act(self.bn1(x))
        source = h if self.activate_shortcut else x
        # Step by step, so that no more than two feature maps beside `source` are alive at a time: without a graph, the
        # forward that takes BatchNorm's statistics for gradient consistency has them for all pairs at once.
        h = self.conv1(h)
        h = self.bn2(h)
        h = self.act(h)
        h = self.conv2(h)
        return h + self.shortcut(source)


class WideEncoder(nn.Sequential):
    """Everything but the classifier: `[B, C, H, W]` to pooled features `[B, 64 * width]`."""

    def __init__(self, depth: int, width: int, channels: int, momentum: float) -> None:
        blocks_per_group = (depth - 4) // 6
        sizes = [16, 16 * width, 32 * width, 64 * width]
        layers: list[nn.Module] = [nn.Conv2d(channels, sizes[0], 3, padding=1, bias=False)]
        for group in range(3):
            for block in range(blocks_per_group):
                first = block == 0
                layers.append(
                    ResidualBlock(
                        sizes[group] if first else sizes[group + 1],
                        sizes[group + 1],
                        stride=2 if first and group > 0 else 1,
                        momentum=momentum,
                        activate_shortcut=first and group == 0,
                    )
                )
        layers += [
            nn.BatchNorm2d(sizes[3], momentum=momentum),
            nn.LeakyReLU(_NEGATIVE_SLOPE),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ]
        super().__init__(*layers)


class WideResNet(nn.Module):
    """WRN-depth-width: a wide encoder and a linear head.

    Reference: Zagoruyko and Komodakis, "Wide Residual Networks" (2016), with leaky ReLU (slope 0.1).

    Args:
        depth: 6 n + 4 layers: 10, 16, 22, 28, ...
        width: Factor on the 16, 32 and 64 channels of the three groups.
        classes: Number of classes K.
        channels: Channels of the images.
        momentum: BatchNorm momentum, in torch's sense.

    Attributes:
        encoder: All but the head.
        head: The linear classifier.
    """

    def __init__(self, depth: int, width: int, classes: int, *, channels: int = 3, momentum: float = 0.001) -> None:
        super().__init__()
        self.encoder = WideEncoder(depth, width, channels, momentum)
        self.head = nn.Linear(64 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=_NEGATIVE_SLOPE, mode="fan_out", nonlinearity="leaky_relu")
        nn.init.xavier_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, K]`."""
        return self.head(self.encoder(x))


def parse_arch(name: str) -> tuple[int, int]:
    """Read `wrn-DEPTH-WIDTH`, or `wrn-DEPTH-WIDTH-gn`.

    Args:
        name: For example `wrn-28-2`.

    Returns:
        Depth and width.

    Raises:
        OptionError: Where the name is of another form, or the depth is not 6 n + 4 with n >= 1.
    """
    match = re.fullmatch(rf"wrn-(\d+)-(\d+)({GROUP_NORM})?", name)
    if match is None:
        raise OptionError(f"--arch {name!r} is unknown: write wrn-DEPTH-WIDTH, for example wrn-28-2, or wrn-28-2-gn.")
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise OptionError(
            f"--arch {name!r}: the depth must be 10, 16, 22, 28, ... (6 n + 4) and the width at least 1; "
            f"found depth {depth} and width {width}."
        )
    return depth, width


def build_model(arch: str, classes: int, *, momentum: float) -> WideResNet:
    """Build the network that `--arch` names, for RGB images; initialised from torch's global generator.

    Args:
        arch: `wrn-DEPTH-WIDTH`; with `-gn` behind it, GroupNorm takes the place of BatchNorm.
        classes: Number of classes K.
        momentum: BatchNorm momentum, in torch's sense.

    Returns:
        The network, in train mode.
    """
    depth, width = parse_arch(arch)
    model = WideResNet(depth, width, classes, momentum=momentum)
    if arch.endswith(GROUP_NORM):
        with_group_norm(model, lambda channels: channels // 8)
    return model


def with_group_norm(model: nn.Module, groups: Callable[[int], int]) -> None:
    """Replace every BatchNorm, in place; scales and shifts start at 1 and 0 as theirs do.

    Args:
        model: The network.
        groups: Number of a layer's channels to the number of their groups.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                channels = child.num_features
                setattr(module, name, nn.GroupNorm(groups(channels), channels, eps=child.eps))
