"""Rows of `sweep_derivatives.py`: linear layers, convolutions, activations, normalisations, poolings, shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sweep_row import Around, Row, around, function, module
from torch import Tensor, nn


def rows() -> Iterator[Row]:
    """All rows of this file."""
    yield from _linear_and_convolutions()
    yield from _activations()
    yield from _normalisations()
    yield from _poolings()
    yield from _shapes()


def _linear_and_convolutions() -> Iterator[Row]:
    yield module("Linear", lambda: nn.Linear(6, 4))
    yield module("Linear(bias=False), 3-D", lambda: nn.Linear(3, 4, bias=False), (2, 3))
    yield function("F.linear", lambda z, w, b: F.linear(z, w, b), w=(4, 6), b=(4,))
    yield around("Bilinear", lambda: nn.Bilinear(3, 3, 4), lambda m, z: m(z[:, :3], z[:, 3:]), (6,))
    yield function("F.bilinear", lambda z, w: F.bilinear(z[:, :3], z[:, 3:], w), w=(2, 3, 3))
    for d, name in enumerate(("Conv1d", "Conv2d", "Conv3d"), start=1):
        size = (5, (4, 3), (3, 2, 3))[d - 1]
        shape = (2, size) if d == 1 else (2, *size)
        kind, transposed = getattr(nn, name), getattr(nn, name.replace("Conv", "ConvTranspose"))
        yield module(name, lambda kind=kind: kind(2, 3, 2), shape)
        yield module(f"{name}(stride, padding)", lambda kind=kind: kind(2, 2, 2, stride=2, padding=1), shape)
        yield module(f"{name}(groups, dilation)", lambda kind=kind: kind(2, 4, 2, 1, 1, 2, 2, bias=False), shape)
        yield module(f"{name}(1 wide)", lambda kind=kind: kind(2, 3, 1), shape)
        for mode in ("circular", "reflect", "replicate"):
            yield module(
                f"{name}({mode})", lambda kind=kind, mode=mode: kind(2, 2, 2, padding=1, padding_mode=mode), shape
            )
        yield module(f"{name}('same')", lambda kind=kind: kind(2, 2, 2, padding="same"), shape)
        yield module(f"ConvTranspose{d}d", lambda kind=transposed: kind(2, 3, 2), shape)
        yield module(f"ConvTranspose{d}d(stride, groups)", lambda kind=transposed: kind(2, 2, 2, 2, 1, 1, 2), shape)
    yield function(
        "F.conv_tbc",
        lambda z, w, b: F.conv_tbc(z.transpose(0, 1).contiguous(), w, b).transpose(0, 1),
        (4, 2),
        w=(2, 2, 3),
        b=(3,),
    )
    yield Row("nn.Unfold", lambda: nn.Unfold(2, 1, 1), (2, 3, 3))
    yield Row("nn.Fold", lambda: nn.Fold((3, 3), 2), (8, 4))
    tokens = [0, 2, 1, 2]
    look = lambda m, z: m(torch.tensor(tokens, device=z.device).expand(len(z), 4)) * z[:, :, None]
    yield around("Embedding", lambda: nn.Embedding(4, 3), look, (4,))
    yield around("Embedding(padding_idx)", lambda: nn.Embedding(4, 3, padding_idx=3), look, (4,))
    yield around("Embedding(sparse)", lambda: nn.Embedding(4, 3, sparse=True), look, (4,))
    yield around("Embedding(max_norm)", lambda: nn.Embedding(4, 3, max_norm=0.7), look, (4,))
    yield around("Embedding(scale_grad_by_freq)", lambda: nn.Embedding(4, 3, scale_grad_by_freq=True), look, (4,))
    for mode in ("sum", "mean", "max"):
        bag = lambda m, z: m(torch.tensor(tokens, device=z.device).expand(len(z), 4)) * z
        yield around(f"EmbeddingBag({mode!r})", lambda mode=mode: nn.EmbeddingBag(4, 3, mode=mode), bag, (3,))


def _activations() -> Iterator[Row]:
    kinks = {
        "ELU": (0,),
        "CELU": (0,),
        "SELU": (0,),
        "ReLU": (0,),
        "ReLU6": (0, 6),
        "LeakyReLU": (0,),
        "RReLU": (0,),
        "PReLU": (0,),
        "Hardshrink": (-0.5, 0.5),
        "Softshrink": (-0.5, 0.5),
        "Hardtanh": (-1, 1),
        "Hardsigmoid": (-3, 3),
        "Hardswish": (-3, 3),
        "Softsign": (0,),
    }
    smooth = (
        "GELU",
        "GLU",
        "LogSigmoid",
        "Mish",
        "SiLU",
        "Sigmoid",
        "Softplus",
        "Tanh",
        "Tanhshrink",
        "Identity",
        "Softmax",
        "Softmin",
        "LogSoftmax",
    )
    for name in (*kinks, *smooth):
        options = {"dim": 1} if name in ("Softmax", "Softmin", "LogSoftmax") else {}
        yield module(
            name, lambda name=name, options=options: getattr(nn, name)(**options).eval(), kinks=kinks.get(name, ())
        )
    for name in (
        "ELU",
        "CELU",
        "SELU",
        "ReLU",
        "ReLU6",
        "LeakyReLU",
        "RReLU",
        "Hardtanh",
        "Hardsigmoid",
        "Hardswish",
        "SiLU",
        "Mish",
    ):
        build = lambda name=name: nn.Sequential(nn.Linear(6, 6), getattr(nn, name)(inplace=True).eval())
        yield module(f"{name}(inplace)", build)
    yield module("Threshold", lambda: nn.Threshold(0.3, 0.1), kinks=(0.3,))
    yield module("GELU('tanh')", lambda: nn.GELU("tanh"))
    yield module("PReLU(channels)", lambda: nn.PReLU(3), (3, 2), kinks=(0,))
    yield module("Softplus(beta=3, threshold)", lambda: nn.Softplus(3.0, 4.0), kinks=(4 / 3,))
    yield module("LeakyReLU(negative slope below 0)", lambda: nn.LeakyReLU(-0.3), kinks=(0,))
    yield module("ELU(alpha=2)", lambda: nn.ELU(2.0), kinks=(0,))
    yield module("CELU(alpha=2)", lambda: nn.CELU(2.0), kinks=(0,))
    yield module("Softmax2d", nn.Softmax2d, (3, 2, 2))
    covers = (
        "tanh",
        "sigmoid",
        "relu_",
        "elu_",
        "celu_",
        "selu_",
        "leaky_relu_",
        "hardtanh_",
        "relu6",
        "rrelu_",
        "threshold_",
        "tanhshrink",
        "softmin",
        "softsign",
    )
    for name in covers:
        bounds = {"threshold_": (0.3, 0.1)}.get(name, ())
        call = lambda z, name=name, bounds=bounds: getattr(F, name)(z * 1.5, *bounds)
        yield function(f"F.{name}", call, row={"covers": (f"F.{name}",), "kinks": (0, 0.2, -2 / 3, 2 / 3)})
    # The pieces of piecewise functions that ordinary inputs do not reach.
    for name in ("Hardsigmoid", "Hardswish", "ReLU6", "SELU", "Softplus"):
        build = lambda name=name: Around(getattr(nn, name)(), lambda m, z: m(z * 5.0))
        yield module(f"{name}, wide", build, kinks=(-0.6, 0, 0.6, 1.2, 4))


def _normalisations() -> Iterator[Row]:
    for d in (1, 2, 3):
        shape = (3, *((3, 2, 2)[:d]))
        for name in (f"BatchNorm{d}d", f"InstanceNorm{d}d"):
            kind = getattr(nn, name)
            yield module(f"{name}(affine), eval", lambda kind=kind: kind(3, affine=True).eval(), shape)
            yield module(
                f"{name}(track), eval", lambda kind=kind: kind(3, affine=True, track_running_stats=True).eval(), shape
            )
        yield module(f"InstanceNorm{d}d, no affine", lambda d=d: getattr(nn, f"InstanceNorm{d}d")(3), shape)
    for d, shape in ((1, (3, 4)), (2, (3, 2, 2)), (3, (3, 2, 1, 2))):
        yield module(
            f"BatchNorm{d}d, train", lambda d=d: getattr(nn, f"BatchNorm{d}d")(3, momentum=0.0), shape, alone=False
        )
    yield module("SyncBatchNorm, eval", lambda: nn.SyncBatchNorm(3).eval(), (3, 2))
    for shape in ((6,), (2, 3), (2, 2, 3)):
        width = shape[-1]
        yield module(f"LayerNorm, {len(shape) + 1}-D", lambda width=width: nn.LayerNorm(width), shape)
    yield module("LayerNorm over two", lambda: nn.LayerNorm((2, 3)), (2, 3))
    yield module("LayerNorm(bias=False)", lambda: nn.LayerNorm(6, bias=False))
    yield module("LayerNorm, no affine", lambda: nn.LayerNorm(6, elementwise_affine=False))
    yield function("torch.layer_norm", lambda z, w: torch.layer_norm(z, (6,), w), w=(6,))
    yield function("torch.native_layer_norm", lambda z, w: torch.native_layer_norm(z, (6,), w, None, 1e-5)[0], w=(6,))
    yield module("RMSNorm", lambda: nn.RMSNorm(6))
    yield module("RMSNorm, no affine", lambda: nn.RMSNorm(3, elementwise_affine=False), (2, 3))
    yield module("GroupNorm", lambda: nn.GroupNorm(2, 4), (4, 3))
    yield module("GroupNorm, 2-D", lambda: nn.GroupNorm(2, 6))
    yield module("GroupNorm, 4-D", lambda: nn.GroupNorm(2, 4), (4, 2, 2))
    yield module("GroupNorm, no affine", lambda: nn.GroupNorm(2, 4, affine=False), (4, 3))
    yield module("GroupNorm, one group", lambda: nn.GroupNorm(1, 4), (4, 3))
    yield function("torch.group_norm", lambda z, w: torch.group_norm(z, 2, w), (4, 3), w=(4,))
    yield function(
        "torch.native_group_norm",
        lambda z, w: torch.native_group_norm(z, w, None, len(z), 4, 3, 2, 1e-5)[0],
        (4, 3),
        w=(4,),
    )
    yield module("LocalResponseNorm", lambda: nn.LocalResponseNorm(3, alpha=0.5), (4, 3))
    yield module("CrossMapLRN2d", lambda: nn.CrossMapLRN2d(3, alpha=0.5), (4, 2, 2))
    for p in (1.0, 2.0, 3.0):
        yield function(f"F.normalize(p={p:g})", lambda z, p=p: F.normalize(z, p=p), row={"kinks": (0,)})
    yield function(
        "F.batch_norm, eval",
        lambda z, w: F.batch_norm(z, z.new_tensor([0.3, -0.2, 0.1]), z.new_tensor([0.5, 1.5, 2.0]), w),
        (3, 2),
        w=(3,),
    )
    yield function("F.instance_norm", lambda z, w: F.instance_norm(z, weight=w), (3, 4), w=(3,))


def _poolings() -> Iterator[Row]:
    sizes = {1: (2, 6), 2: (2, 4, 4), 3: (1, 4, 2, 4)}
    for d, shape in sizes.items():
        for name, options in (
            (f"AvgPool{d}d", {"kernel_size": 2}),
            (f"AvgPool{d}d(padding)", {"kernel_size": 2, "stride": 1, "padding": 1, "count_include_pad": False}),
            (f"MaxPool{d}d", {"kernel_size": 2}),
            (f"MaxPool{d}d(overlap)", {"kernel_size": 2, "stride": 1, "padding": 1}),
            (f"MaxPool{d}d(dilation, ceil)", {"kernel_size": 2, "dilation": 2, "ceil_mode": True, "padding": 1}),
            (f"LPPool{d}d", {"norm_type": 2, "kernel_size": 2}),
            (f"LPPool{d}d(p=3)", {"norm_type": 3, "kernel_size": 2}),
            (f"AdaptiveAvgPool{d}d", {"output_size": 2}),
            (f"AdaptiveAvgPool{d}d(1)", {"output_size": 1}),
            (f"AdaptiveAvgPool{d}d(3, uneven)", {"output_size": 3}),
            (f"AdaptiveMaxPool{d}d", {"output_size": 2}),
            (f"AdaptiveMaxPool{d}d(1)", {"output_size": 1}),
            (f"AdaptiveMaxPool{d}d(3, uneven)", {"output_size": 3}),
        ):
            kind = getattr(nn, name.partition("(")[0], None)
            if kind is not None:
                positive = "positive" if name.startswith("LP") else "spread"
                yield module(
                    name, lambda kind=kind, options=options: kind(**options), shape, inputs=positive, kinks=(0,)
                )
        pool, back = getattr(nn, f"MaxPool{d}d")(2, return_indices=True), getattr(nn, f"MaxUnpool{d}d")(2)
        yield Row(
            f"nn.MaxUnpool{d}d",
            lambda pool=pool, back=back: Around(back, lambda m, z, pool=pool: m(*pool(z))),
            shape,
            "spread",
            covers=(f"F.max_pool{d}d_with_indices", f"F.max_unpool{d}d"),
        )
        yield function(
            f"F.adaptive_max_pool{d}d_with_indices",
            lambda z, d=d: getattr(F, f"adaptive_max_pool{d}d")(z, 2, True)[0],
            shape,
            row={"inputs": "spread", "covers": (f"F.adaptive_max_pool{d}d_with_indices",)},
        )
    for d in (2, 3):
        shape = sizes[d] if d == 2 else (1, 4, 4, 4)

        def fractional(m: Any, z: Tensor) -> Tensor:
            m._random_samples = z.new_full((len(z), z.shape[1], z.dim() - 2), 0.3)
            return m(z)

        yield around(
            f"FractionalMaxPool{d}d",
            lambda d=d: getattr(nn, f"FractionalMaxPool{d}d")(2, output_ratio=0.7),
            fractional,
            shape,
            inputs="spread",
            covers=(f"F.fractional_max_pool{d}d_with_indices",),
        )
    yield function("Tensor.max over a dimension", lambda z: z.max(1).values, (3, 2), row={"inputs": "spread"})
    yield function("torch.amax, amin", lambda z: z.amax((1, 2)) - z.amin((1, 2)), (3, 2), row={"inputs": "spread"})
    yield function("torch.median", lambda z: z.median(1).values, row={"inputs": "spread"})
    yield function("torch.quantile", lambda z: z.quantile(0.3, 1), row={"inputs": "spread"})
    yield function("torch.sort, topk", lambda z: (z.sort(1).values, z.topk(2, 1).values), row={"inputs": "spread"})
    yield function("torch.cummax", lambda z: z.cummax(1).values, row={"inputs": "spread"})
    yield function("torch.kthvalue", lambda z: z.kthvalue(2, 1).values, row={"inputs": "spread"})


def _shapes() -> Iterator[Row]:
    for d, shape in ((1, (2, 4)), (2, (2, 3, 4)), (3, (1, 3, 2, 4))):
        for kind in ("Constant", "Zero", "Circular", "Reflection", "Replication"):
            options = (1, 0.5) if kind == "Constant" else (1,)
            yield module(
                f"{kind}Pad{d}d", lambda kind=kind, d=d, options=options: getattr(nn, f"{kind}Pad{d}d")(*options), shape
            )
    yield function("F.pad(negative)", lambda z: F.pad(z, (-1, 2, 1, -1)), (3, 4))
    yield module("PixelShuffle", lambda: nn.PixelShuffle(2), (4, 2, 2))
    yield module("PixelUnshuffle", lambda: nn.PixelUnshuffle(2), (1, 4, 4))
    yield module("ChannelShuffle", lambda: nn.ChannelShuffle(2), (4, 2, 2))
    yield function("F.native_channel_shuffle", lambda z: F.native_channel_shuffle(z, 2), (4, 2, 2))
    yield module("Flatten", nn.Flatten, (2, 3))
    yield module("Unflatten", lambda: nn.Unflatten(1, (2, 3)))
    modes = {
        "nearest": (4,),
        "nearest-exact": (4,),
        "linear": (4,),
        "bilinear": (3, 4),
        "bicubic": (3, 4),
        "area": (3, 4),
        "trilinear": (2, 3, 2),
    }
    for mode, size in modes.items():
        shape = (2, *size)
        for scale in (1.7, 0.6):
            for corners in (None, True) if mode.endswith(("linear", "cubic")) else (None,):
                name = f"nn.Upsample({mode}, x{scale}{', align' if corners else ''})"
                build = lambda mode=mode, scale=scale, corners=corners: nn.Upsample(None, scale, mode, corners)
                yield Row(name, build, shape, covers=("F.upsample",))
    for mode in ("nearest", "nearest-exact"):
        for size in ((3, 4), (2, 3, 2)):
            yield function(
                f"F.interpolate({mode}, {len(size) + 2}-D)",
                lambda z, mode=mode: F.interpolate(z, scale_factor=2, mode=mode),
                (2, *size),
            )
    for mode in ("bilinear", "bicubic"):
        call = lambda z, mode=mode: F.interpolate(z, size=(3, 3), mode=mode, antialias=True)
        yield function(f"F.interpolate({mode}, antialias)", call, (1, 5, 4))
    yield module(
        "UpsamplingNearest2d", lambda: nn.UpsamplingNearest2d(scale_factor=2), (1, 3, 2), covers=("F.upsample_nearest",)
    )
    yield module(
        "UpsamplingBilinear2d",
        lambda: nn.UpsamplingBilinear2d(scale_factor=2),
        (1, 3, 2),
        covers=("F.upsample_bilinear",),
    )
    for mode in ("bilinear", "nearest", "bicubic"):
        for padding in ("zeros", "border", "reflection"):
            call = lambda z, g, mode=mode, padding=padding: F.grid_sample(
                z,
                (0.7 * torch.tanh(g + z[:, :1, :1, :1] * 0.1)).expand(len(z), 2, 3, 2),
                mode,
                padding,
                align_corners=False,
            )
            yield function(f"F.grid_sample({mode}, {padding})", call, (2, 3, 4), g=(1, 2, 3, 2))
    yield function(
        "F.grid_sample(3-D)",
        lambda z, g: F.grid_sample(z, torch.tanh(g).expand(len(z), 1, 2, 2, 3), align_corners=False),
        (1, 2, 3, 2),
        g=(1, 1, 2, 2, 3),
    )
    yield function("F.affine_grid", lambda z: F.affine_grid(z, [len(z), 1, 2, 3], align_corners=False), (2, 3))
