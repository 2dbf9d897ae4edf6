"""Rows of `sweep_derivatives.py`: attention, recurrence, and functions of torch itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sweep_row import Row, around, function, module
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def rows() -> Iterator[Row]:
    """All rows of this file."""
    yield from _attention()
    yield from _recurrence()
    yield from _functions_of_torch()
    yield from _scripted()


def _attention() -> Iterator[Row]:
    def heads(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            z.unflatten(2, (2, 2)).transpose(1, 2),
            z.sin().unflatten(2, (2, 2)).transpose(1, 2),
            z.unflatten(2, (2, 2)).transpose(1, 2) * 2,
        )

    def by(backend: SDPBackend, **options: Any) -> Any:
        def call(z: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads(z), **options)

        return call

    yield function(
        "F.scaled_dot_product_attention (default)", lambda z: F.scaled_dot_product_attention(*heads(z)), (3, 4)
    )
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        for name, options in (("", {}), (", causal", {"is_causal": True})):
            yield function(
                f"F.scaled_dot_product_attention ({backend.name.lower()}{name})", by(backend, **options), (3, 4)
            )
    mask = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])
    yield function(
        "F.scaled_dot_product_attention (mask)",
        lambda z: F.scaled_dot_product_attention(*heads(z), mask.to(z.device)),
        (3, 4),
    )
    yield function(
        "F.scaled_dot_product_attention (bias)",
        lambda z, b: F.scaled_dot_product_attention(*heads(z), b),
        (3, 4),
        b=(3, 3),
    )
    for name, options in (("", {}), (", bias_kv", {"add_bias_kv": True}), (", zero_attn", {"add_zero_attn": True})):
        build = lambda options=options: nn.MultiheadAttention(4, 2, batch_first=True, **options)
        yield around(f"MultiheadAttention{name}", build, lambda m, z: m(z, z.sin(), z), (3, 4))
    yield around(
        "MultiheadAttention(kdim, vdim)",
        lambda: nn.MultiheadAttention(4, 2, kdim=2, vdim=2, batch_first=True),
        lambda m, z: m(z, z[..., :2], z[..., 2:], need_weights=False)[0],
        (3, 4),
    )
    for train in (True, False):
        for first in (True, False):
            name = f"TransformerEncoderLayer({'norm first, ' if first else ''}{'train' if train else 'eval'})"
            build = lambda train=train, first=first: nn.TransformerEncoderLayer(
                4, 2, 4, 0.0, "gelu", batch_first=True, norm_first=first
            ).train(train)
            yield module(name, build, (2, 4))
    yield module(
        "TransformerEncoder",
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 4, 0.0, "gelu", batch_first=True), 1, enable_nested_tensor=False
        ),
        (2, 4),
    )
    yield around(
        "TransformerDecoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 4, 0.0, "gelu", batch_first=True), 1),
        lambda m, z: m(z, z.sin()),
        (2, 4),
    )
    yield around(
        "Transformer",
        lambda: nn.Transformer(4, 2, 1, 1, 4, 0.0, "gelu", batch_first=True).eval(),
        lambda m, z: m(z, z.sin()),
        (2, 4),
    )


def _recurrence() -> Iterator[Row]:
    for name in ("RNN", "LSTM", "GRU"):
        kind = getattr(nn, name)
        variants: dict[str, dict[str, Any]] = {
            "": {},
            ", two layers": {"num_layers": 2},
            ", bidirectional": {"bidirectional": True},
            ", no bias": {"bias": False},
        }
        variants |= {
            "RNN": {", relu": {"nonlinearity": "relu"}},
            "LSTM": {", projection": {"proj_size": 2}},
            "GRU": {},
        }[name]
        for variant, options in variants.items():
            build = lambda kind=kind, options=options: kind(2, 3, batch_first=True, **options)
            yield around(f"{name}{variant}", build, lambda m, z: m(z)[0], (3, 2))
        yield around(f"{name}Cell", lambda name=name: getattr(nn, f"{name}Cell")(4, 3), lambda m, z: m(z), (4,))
    yield function(
        "torch._thnn_fused_lstm_cell",
        lambda z, w: torch._VF.lstm_cell(z, (z[:, :2], z[:, 2:]), w, w[:, :2]),
        (4,),
        w=(8, 4),
    )


def _functions_of_torch() -> Iterator[Row]:
    """What models use beside torch.nn."""
    pointwise = (
        "exp",
        "expm1",
        "sin",
        "cos",
        "atan",
        "sinh",
        "cosh",
        "asinh",
        "erf",
        "sigmoid",
        "sinc",
        "tanh",
        "square",
        "exp2",
        "deg2rad",
        "logit",
        "erfinv",
        "abs",
        "frac",
        "i0",
        "neg",
        "positive",
    )
    for name in pointwise:
        inside = (lambda z: z.sigmoid()) if name in ("logit", "erfinv") else (lambda z: z)
        yield function(
            f"torch.{name}",
            lambda z, name=name, inside=inside: getattr(torch, name)(inside(z)),
            row={"kinks": (-1, 0, 1)},
        )
    for name in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma", "digamma", "acosh"):
        yield function(
            f"torch.{name}",
            lambda z, name=name: getattr(torch, name)(z + (1.5 if name == "acosh" else 0)),
            row={"inputs": "positive"},
        )
    yield function("torch.tan", lambda z: torch.tan(z / 3))
    pair = {
        "atan2": torch.atan2,
        "hypot": torch.hypot,
        "logaddexp": torch.logaddexp,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "fmod": lambda a, b: torch.fmod(a, b.abs() + 0.3),
        "remainder": lambda a, b: torch.remainder(a, b.abs() + 0.3),
        "pow": lambda a, b: a.abs().pow(b),
        "float_power": lambda a, b: a.abs().float_power(b),
        "xlogy": lambda a, b: torch.xlogy(a, b.abs()),
        "lerp": lambda a, b: torch.lerp(a, b, a.sin()),
        "copysign": torch.copysign,
        "addcmul": lambda a, b: torch.addcmul(a, a, b),
        "addcdiv": lambda a, b: torch.addcdiv(a, a, b.exp()),
        "outer": lambda a, b: a[:, :, None] * b[:, None],
        "cross": torch.cross,
        "div": lambda a, b: a / b.exp(),
    }
    for name, call in pair.items():
        options = {"dim": 1} if name == "cross" else {}
        yield function(
            f"torch.{name}",
            lambda z, call=call, options=options: call(z[:, :3], z[:, 3:], **options),
            row={"kinks": (0,)},
        )
    reduce = {
        "logsumexp": lambda z: z.logsumexp(1),
        "softmax, log_softmax": lambda z: (z.softmax(1), z.log_softmax(1)),
        "cumsum": lambda z: z.cumsum(1),
        "cumprod": lambda z: z.cumprod(1),
        "prod": lambda z: z.prod(1),
        "logcumsumexp": lambda z: z.logcumsumexp(1),
        "var": lambda z: z.var(1),
        "std": lambda z: z.std(1, correction=0),
        "var_mean": lambda z: torch.var_mean(z, 1),
        "std_mean": lambda z: torch.std_mean(z, 1),
        "mean": lambda z: z.mean(1),
        "renorm": lambda z: torch.renorm(z, 2, 0, 0.5),
        "diff": lambda z: z.diff(),
        "nansum": lambda z: z.nansum(1),
        "trapezoid": lambda z: torch.trapezoid(z),
    }
    for name, call in reduce.items():
        yield function(f"torch.{name}", call, row={"kinks": (0,)})
    for p in (0.5, 1.0, 1.5, 2.0, 3.0, float("inf"), float("-inf")):
        yield function(
            f"torch.linalg.vector_norm({p:g})",
            lambda z, p=p: torch.linalg.vector_norm(z, p, 1),
            row={"inputs": "spread", "kinks": (0,)},
        )
    yield function("Tensor.norm (Frobenius)", lambda z: z.norm(dim=(1, 2)), (2, 3))
    yield function(
        "torch.clamp, clip",
        lambda z, w: (z.clamp(-0.7, 0.7), z.clamp(min=w), z.clip(max=w)),
        row={"kinks": (-0.7, 0.7)},
        w=(6,),
    )
    yield function(
        "torch.where, masked_fill",
        lambda z: (torch.where(z > 0, z.exp(), z), z.masked_fill(z < 0, 0.0) * z),
        row={"kinks": (0,)},
    )
    yield function("torch.nan_to_num", lambda z: z.nan_to_num(0.0).square())
    index = torch.tensor([[0, 2, 2], [1, 1, 0]])
    ids = lambda z: index.to(z.device).expand(len(z), 2, 3)
    yield function("torch.gather, take_along_dim", lambda z: (z.gather(2, ids(z)), z.take_along_dim(ids(z), 2)), (2, 3))
    yield function(
        "torch.scatter, scatter_add",
        lambda z: (
            z.scatter(2, ids(z)[..., :1], z[..., 1:2].square()),
            torch.zeros_like(z).scatter_add(2, ids(z), z.square()),
        ),
        (2, 3),
    )
    for reduce_by in ("prod", "mean", "amax", "amin"):
        yield function(
            f"torch.scatter_reduce({reduce_by})",
            lambda z, r=reduce_by: z.scatter_reduce(2, ids(z), z.square(), r),
            (2, 3),
            row={"inputs": "spread", "kinks": (0,)},
        )
    yield function(
        "torch.index_select, indexing",
        lambda z: (z.index_select(1, torch.tensor([2, 0, 2], device=z.device)), z[:, [1, 1, 3]].square(), z[:, ::2]),
    )
    yield function(
        "torch.index_add, index_copy",
        lambda z: (
            z.index_add(1, torch.tensor([0, 0, 2], device=z.device), z[:, :3].square()),
            z.index_copy(1, torch.tensor([1, 4], device=z.device), z[:, 2:4].sin()),
        ),
    )
    yield function(
        "torch.roll, flip, rot90, tril",
        lambda z: (z.roll(1, 1), z.flip(2), z.rot90(1, (1, 2)), z.tril(), z.diagonal(0, 1, 2)),
        (3, 3),
    )
    yield function(
        "torch.cat, stack, split, unbind",
        lambda z: (torch.cat([z, z.square()], 1), torch.stack(z.split(3, 1), 1), *z.unbind(1)),
    )
    yield function(
        "Tensor.unfold, as_strided", lambda z: (z.unfold(1, 3, 2).square(), z.movedim(1, 0).square().movedim(0, 1))
    )
    yield function(
        "torch.repeat_interleave, expand, tile",
        lambda z: (z.repeat_interleave(2, 1).sin(), z[:, None].expand(-1, 2, -1).square(), z.tile(1, 2).cos()),
    )
    yield function(
        "torch.complex, abs, angle",
        lambda z: (torch.complex(z[:, :3], z[:, 3:]).abs(), torch.complex(z[:, :3], z[:, 3:]).square().real),
        row={"kinks": (0,)},
    )
    yield function(
        "torch.fft",
        lambda z: (torch.fft.rfft(z).abs(), torch.fft.irfft(torch.fft.rfft(z).square()), torch.fft.fft(z).imag),
    )
    yield function("torch.fft.fft2", lambda z: torch.fft.fft2(z).abs(), (2, 3))
    yield function(
        "torch.stft",
        lambda z: torch.stft(z, 4, 2, window=torch.ones(4, dtype=z.dtype, device=z.device), return_complex=True).abs(),
        (8,),
    )
    yield function(
        "torch.einsum, bmm, baddbmm",
        lambda z, w: (torch.einsum("bij,jk->bik", z, w), z.bmm(z.mT), torch.baddbmm(z, z.bmm(z.mT), z)),
        (2, 3),
        w=(3, 4),
    )
    yield function(
        "torch.matmul, addmm, mv, tensordot",
        lambda z, w: (z @ w, torch.addmm(z[:, :2], z, w.sin()), torch.tensordot(z, w, 1), (z[:, None] @ w[:, 0])),
        w=(6, 2),
    )
    yield function("torch.kron", lambda z: torch.stack([torch.kron(one[:3], one[3:]) for one in z]))
    if hasattr(torch, "segment_reduce"):
        yield function(
            "torch.segment_reduce",
            lambda z: torch.stack(
                [torch.segment_reduce(one, "mean", lengths=torch.tensor([2, 4], device=z.device)) for one in z]
            ),
        )


def gated(z: Tensor, w: Tensor) -> Tensor:
    """For the script compiler, which differentiates by formulas of its own once it is warm."""
    return z * torch.sigmoid(w * z) + torch.tanh(z + w)


def _scripted() -> Iterator[Row]:
    compiled = torch.jit.script(gated)
    yield function("torch.jit.script", lambda z, w: compiled(z, w), w=(6,))
