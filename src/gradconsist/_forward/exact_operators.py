"""Replacements for operators of torch whose second derivative is missing or wrong, and for dropout.

Each replaces a function of torch while the user's model runs. A function that cannot be computed exactly raises an
error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradconsist._forward.batchnorm import Statistics, affine, scaled, standardized
from gradconsist._inputs.precision import wide
from gradconsist.errors import UnsupportedModuleError

# With dropout off, these return their first argument unchanged.
_DROPOUTS = [
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_),
    *(torch.alpha_dropout, torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_),
]
_ATTENTION_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_EUCLIDEAN = ("fro", 2, 2.0)


# Under torch.func.vmap the second derivative of the fused LayerNorm and InstanceNorm silently lacks the part through
# mean and variance (seen in torch 2.13 and 2.15 on CPU; the loop is right). Written as formulas, both are right.


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    del cudnn_enable
    if list(input.shape[-len(normalized_shape) :]) != list(normalized_shape):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # torch raises its own error
    y = standardized(wide(input), len(normalized_shape), eps).flatten(-len(normalized_shape))
    weight, bias = (None if given is None else given.flatten() for given in (weight, bias))
    return scaled(y, weight, bias, y.dim() - 1).view(input.shape).to(input.dtype)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Computes InstanceNorm without updating running statistics; the affine map if `use_input_stats` is False."""
    del momentum
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise UnsupportedModuleError(
                "InstanceNorm without input statistics needs running ones, and there are none: pass `running_mean` and"
                " `running_var`, or use_input_stats=True."
            )
        return affine(input, Statistics(running_mean, running_var), weight, bias, eps)
    return scaled(standardized(wide(input), input.dim() - 2, eps), weight, bias, 1).to(input.dtype)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    del cudnn_enabled
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Computes ``v * g / ||v||``; torch's fused form has a silently wrong second derivative (seen in torch 2.13)."""
    if dim == -1:
        return v * (g / torch.linalg.vector_norm(v))
    others = [other for other in range(v.dim()) if other != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Computes ``clamp(x / 6 + 1 / 2, 0, 1)``; torch's fused form has no second derivative."""
    y = (input / 6.0 + 0.5).clamp(0.0, 1.0)
    return input.copy_(y) if inplace else y


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        raise UnsupportedModuleError("Embedding(max_norm=...) writes into the weights during the forward: remove it.")
    if scale_grad_by_freq:
        raise UnsupportedModuleError(
            "Embedding(scale_grad_by_freq=True) scales a sample's gradient by the rest of the batch: switch it off."
        )
    del sparse, norm_type  # inner products of sparse gradients cannot be differentiated; the value is the same
    y = F.embedding(input, weight)
    if padding_idx is None:
        return y
    # Not torch's `padding_idx`, which vmap ignores if each sample has its own table, as a parametrized weight has.
    padding = (input == padding_idx + (len(weight) if padding_idx < 0 else 0)).unsqueeze(-1)
    return torch.where(padding, y.detach(), y)


def _torch_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    padding = padding_idx if padding_idx >= 0 else None
    return _embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """Writes `src` at one place; under vmap torch's own has a wrong derivative for `src` (seen in torch 2.14)."""
    place = index % input.shape[dim]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, place, place + 1)


def _embedding_bag(*args: Any, **kwargs: Any) -> Tensor:
    raise UnsupportedModuleError(
        "EmbeddingBag has no second derivative in torch: use Embedding followed by a sum or mean over the tokens."
    )


def _attention_without_dropout(*args: Any, **kwargs: Any) -> Any:
    bound = _ATTENTION_SIGNATURE.bind(*args, **kwargs)
    bound.arguments["training"] = False
    return F.multi_head_attention_forward(*bound.args, **bound.kwargs)


def _scaled_attention_without_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    del dropout_p
    return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, **options)


# Euclidean norms. At x = 0 torch gives ||x|| the derivative 0, a subgradient, but divides by the norm on the way: the
# second derivative has 0 / 0, and the whole model gets NaN. A map of zeros is not rare (a dead channel before a GRN, as
# in ConvNeXt V2, in bfloat16 above all). Everywhere else these functions run torch's own kernels on the same numbers.


def _norm(x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    zero = torch.linalg.vector_norm(x.detach(), 2, dim, keepdim=True) == 0
    value = torch.linalg.vector_norm(x.masked_fill(zero, 1.0), 2, dim, keepdim=keepdim)
    zero = zero if keepdim else torch.linalg.vector_norm(x.detach(), 2, dim) == 0
    return value.masked_fill(zero, 0.0)


def _tensor_norm(input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    if p in _EUCLIDEAN and dtype is None and input.is_floating_point():
        return _norm(input, dim, keepdim)
    other: Tensor = torch.norm(input, p, dim, keepdim, dtype=dtype)
    return other


def _torch_norm(
    input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> Tensor:
    if out is None:
        return _tensor_norm(input, p, dim, keepdim, dtype)
    other: Tensor = torch.norm(input, p, dim, keepdim, out=out, dtype=dtype)
    return other


def _vector_norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, **others: Any) -> Tensor:
    if ord == 2 and not any(value is not None for value in others.values()) and x.is_floating_point():
        return _norm(x, dim, keepdim)
    return torch.linalg.vector_norm(x, ord, dim, keepdim, **others)


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    if p == 2 and out is None and input.is_floating_point():
        return input / _norm(input, dim, True).clamp_min(eps)
    return F.normalize(input, p, dim, eps, out)


EXACT: dict[Any, Callable[..., Any]] = {
    F.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch._weight_norm: _weight_norm,
    **dict.fromkeys((torch.select_scatter, Tensor.select_scatter), _select_scatter),
    F.hardsigmoid: _hardsigmoid,
    F.embedding: _embedding,
    torch.embedding: _torch_embedding,
    F.embedding_bag: _embedding_bag,
    torch.embedding_bag: _embedding_bag,
    Tensor.norm: _tensor_norm,
    torch.norm: _torch_norm,
    torch.linalg.vector_norm: _vector_norm,
    F.normalize: _normalize,
}
"""Replacements by the function of torch that they replace."""

WITHOUT_DROPOUT: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_DROPOUTS, lambda input, *args, **kwargs: input),
    F.multi_head_attention_forward: _attention_without_dropout,
    F.scaled_dot_product_attention: _scaled_attention_without_dropout,
}
"""More replacements, for when random layers are off."""
