"""Networks: wide residual ones for small images, those of torchvision and timm, and the user's own.

Index letters: B batch, C channels, H and W image sides, K classes.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.errors import OptionError, reason
from trainer.option_checks import GROUP_NORM, is_wide, parse_arch
from trainer.processes import ALONE, Processes

if TYPE_CHECKING:  # the networks alone need torch and nothing else
    from trainer.config import Config

GROUPS = 32  # of GroupNorm, as in its paper; fewer where the channels cannot be divided by it
PRETRAINED = "pretrained"
_NEGATIVE_SLOPE = 0.1


class ResidualBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions: `x + conv2(act(bn2(conv1(act(bn1(x))))))`.

    Where the shape changes, the shortcut is a 1x1 convolution. The first block of the network activates its
    input before *both* paths, as the reference network of the FixMatch line of work does.

    The stride is that of the first convolution (and of the shortcut), the momentum that of the running statistics, in
    torch's sense (weight of the new value).
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
        before, layers = 16, list[nn.Module]([nn.Conv2d(channels, 16, 3, padding=1, bias=False)])
        for group, size in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range((depth - 4) // 6):
                stride = 2 if block == 0 and group > 0 else 1
                layers.append(ResidualBlock(before, size, stride, momentum, activate_shortcut=len(layers) == 1))
                before = size
        norm = nn.BatchNorm2d(before, momentum=momentum)
        super().__init__(*layers, norm, nn.LeakyReLU(_NEGATIVE_SLOPE), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class WideResNet(nn.Module):
    """WRN-depth-width: a wide encoder and a linear head.

    Reference: Zagoruyko and Komodakis, "Wide Residual Networks" (2016), with leaky ReLU (slope 0.1).
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


def build_model(arch: str, classes: int, *, momentum: float | None = None, pretrained: bool = False) -> nn.Module:
    """Build the network that `--arch` names, for RGB images; initialised from torch's global generator.

    Without a momentum, BatchNorms keep the network's own. `pretrained` starts from the published weights, with a new
    head (torchvision and timm).
    """
    if is_wide(arch):
        if pretrained:
            raise OptionError(f"--init-from {PRETRAINED}: {arch} has no published weights; give a file.")
        depth, width = parse_arch(arch)
        model: nn.Module = WideResNet(depth, width, classes, momentum=0.1 if momentum is None else momentum)
        if arch.endswith(GROUP_NORM):
            with_group_norm(model, lambda channels: channels // 8)
        return model
    kind, _, name = arch.partition(":")
    if name and kind != "timm" and pretrained:
        raise OptionError(f"--init-from {PRETRAINED}: {arch} is your own function, which may load them itself.")
    if not name:
        model = _of_torchvision(arch, classes, pretrained)
    else:
        model = _of_timm(name, classes, pretrained) if kind == "timm" else _of_the_user(kind, name, classes)
    if classifier_head(model)[1].out_features != classes:
        raise OptionError(f"--arch {arch}: its last linear layer is not the classifier; try resnet50.")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and momentum is not None:
            module.momentum = momentum
    return model.train()


def _of_torchvision(name: str, classes: int, pretrained: bool) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=6) or ["resnet18", "resnet50"]
        raise OptionError(
            f"--arch {name!r} is no classifier of torchvision.models: write for example {', '.join(near)}; "
            "wrn-DEPTH-WIDTH, timm:NAME or MODULE:FUNCTION."
        )
    model = models.get_model(name, weights=None, num_classes=classes)
    if pretrained:
        weights = models.get_model_weights(name).DEFAULT
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise OptionError(
                f"--init-from {PRETRAINED}: the weights of {name} could not be downloaded ({error}): fetch "
                f"{weights.url} elsewhere and give the file."
            ) from error
        head = classifier_head(model)[0]
        kept = {key: value for key, value in state.items() if not key.startswith(head + ".")}
        model.load_state_dict({**model.state_dict(), **kept})
    return model


def _of_timm(name: str, classes: int, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise OptionError(f"--arch timm:{name} needs timm: pip install timm") from error
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=4) or ["resnet18"]
        raise OptionError(f"--arch timm:{name}: timm has no such model; write for example timm:{', timm:'.join(near)}.")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=classes)
    except Exception as error:  # a download can fail in any way, and with any class
        raise OptionError(f"--arch timm:{name} could not be built ({reason(error, where=False)}).") from error


def _of_the_user(module: str, function: str, classes: int) -> nn.Module:
    arch = f"{module}:{function}"
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` has it
    try:
        model = getattr(importlib.import_module(module), function)(classes)
    except Exception as error:  # the user's code can fail in any way
        raise OptionError(
            f"--arch {arch}: calling {function}({classes}) failed ({reason(error)}): write MODULE:FUNCTION, a function "
            "of the number of classes that returns the network."
        ) from error
    if not isinstance(model, nn.Module):
        raise OptionError(f"--arch {arch} returned a {type(model).__name__}: return the network, an nn.Module.")
    return model


def build_network(config: Config, classes: int, processes: Processes = ALONE) -> nn.Module:
    """Build the network with the normalisation that `--norm` asks for."""
    pretrained = config.init_from == PRETRAINED
    model = build_model(config.arch, classes, momentum=config.bn_momentum, pretrained=pretrained)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if config.norm != "batch" and not norms:
        raise OptionError(f"--norm {config.norm}: {config.arch} has no BatchNorm to replace; leave it out.")
    odd = [norm for norm in norms if type(norm) is not nn.BatchNorm2d or not norm.affine or norm.momentum is None]
    if config.norm != "batch" and odd:
        raise OptionError(
            f"--norm {config.norm}: {config.arch} has a {type(odd[0]).__name__} that is more, or less, than a "
            "BatchNorm2d with scale and shift, and cannot be replaced: leave it out."
        )
    if config.norm == "group":
        with_group_norm(model, lambda channels: math.gcd(GROUPS, channels))
    if config.norm == "sync" and processes.world == 1:
        raise OptionError("--norm sync is for several processes, and there is one: leave it out.")
    return model


def check_forward(model: nn.Module, config: Config, classes: int, size: Sequence[int]) -> None:
    """Try the network on two images in both modes, so that one that does not fit is refused before the first step.

    It and the random stream are left as they are, but for layers that learn their shapes.
    """
    images, state = torch.zeros(2, 3, *size, device=next(model.parameters()).device), torch.get_rng_state()
    mode = "eval"
    try:
        with torch.no_grad():
            outputs = {mode: model.eval()(images)}
            mode = "train"
            outputs[mode] = copy.deepcopy(model).train()(images)  # as it is copied for the average
    except Exception as error:  # the network's code can fail in any way
        what = f"does not take images of {size[0]}x{size[1]} in {mode} mode ({reason(error)})"
        raise OptionError(f"--arch {config.arch} {what}: give another --image-size or --arch.") from error
    finally:
        torch.set_rng_state(state)
        model.train()
    for mode, out in outputs.items():
        if not isinstance(out, Tensor) or out.shape != (2, classes):
            found = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise OptionError(
                f"--arch {config.arch} returns {found} for 2 images in {mode} mode: expected logits (2, {classes})."
            )
    foreign = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if foreign:
        raise OptionError(f"--arch {config.arch}: {foreign[0]} in its state_dict is no tensor, and cannot be exported.")


def classifier_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of a network's last linear layer."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise OptionError(f"--arch: {type(model).__name__} has no linear layer that could be its head: try resnet18.")
    return layers[-1]


class JoinedBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics in train mode are of the images of all processes; each must have as many.

    Unlike torch's SyncBatchNorm it runs on any device, so that a test without a GPU can hold it against one process.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, C, H, W]`, B on this process."""
        if not self.training:
            return super().forward(x)
        world, values = dist.get_world_size(), x.float()
        count = world * values.numel() // values.shape[1]
        mean = _Sum.apply(values.mean((0, 2, 3))) / world
        centred = values - mean.view(1, -1, 1, 1)
        variance = _Sum.apply(centred.square().mean((0, 2, 3))) / world
        unbiased = variance * count / (count - 1)
        for known, now in ((self.running_mean, mean), (self.running_var, unbiased)):
            if known is not None:
                known.lerp_(now.detach(), float(self.momentum or 0))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, and of its gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def join_statistics(model: nn.Module) -> None:
    """Let every BatchNorm take its statistics over all processes, in place; names and numbers stay what they are."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = JoinedBatchNorm


def with_group_norm(model: nn.Module, groups: Callable[[int], int]) -> None:
    """Replace every BatchNorm, in place; scales and shifts start at 1 and 0 as theirs do."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                channels = child.num_features
                setattr(module, name, nn.GroupNorm(groups(channels), channels, eps=child.eps))
