"""Replaces operators that have a rule, which run with the parameters themselves, and makes pointwise ones cheaper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradconsist._forward.batchnorm import scaled, standardized
from gradconsist.engines.ghost.conv import Convolution, Geometry, Stage, normal_form, per_sample_convolution
from gradconsist.engines.ghost.pointwise import ChannelAffine, LeakyRelu, Standardize
from gradconsist.engines.ghost.record import Record, rows
from gradconsist.engines.ghost.rules import Bias, ConvolutionWeight, EmbeddingWeight, LinearWeight

_MATMUL = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class Operators(Record):
    """Replaces torch functions and records their uses of compared parameters.

    Args:
        parameters: see `Record`.
        stand_ins: see `Record`.
        stage: passed to the convolutions.

    Attributes:
        replacements: maps torch functions to their replacements.
    """

    def __init__(self, parameters: Mapping[str, Tensor], stand_ins: Mapping[str, Tensor], stage: Stage) -> None:
        super().__init__(parameters, stand_ins)
        self._stage = stage
        self.replacements: dict[Any, Callable[..., Any]] = {
            F.linear: self._linear,
            **{f: partial(self._matmul, f) for f in _MATMUL},
            **{f: partial(self._addmm, f) for f in (torch.addmm, Tensor.addmm)},
            F.embedding: self._embedding,
            F.cross_entropy: self._cross_entropy,
            scaled: self._scaled,
            standardized: self._standardized,
            F.group_norm: self._group_norm,
            **{getattr(torch, f"conv{d}d"): self._convolution(d) for d in (1, 2, 3)},
            **{getattr(torch, f"conv_transpose{d}d"): self._transposed(d) for d in (1, 2, 3)},
            **dict.fromkeys((F.relu, torch.relu, Tensor.relu), self._relu),
            F.leaky_relu: self._leaky_relu,
            Tensor.requires_grad.__get__: self._requires_grad,  # type: ignore[attr-defined]
            Tensor.grad_fn.__get__: refuse_nodes,  # type: ignore[union-attr]
        }

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        name, w = self._own(weight)
        if w is None or w.dim() != 2:
            return F.linear(input, weight, bias)
        return self._multiply(input, name, w, LinearWeight(), bias)

    def _matmul(self, function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        name, w = (None, None) if len(args) != 2 or options else self._own(args[1])
        if w is None or w.dim() != 2:
            return function(*args, **options)
        return self._multiply(args[0], name, w, LinearWeight(transposed=True))

    def _addmm(self, function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        name, w = (None, None) if len(args) != 3 or options else self._own(args[2])
        if w is None or args[0].dim() != 1:
            return function(*args, **options)
        return self._multiply(args[1], name, w, LinearWeight(transposed=True), args[0])

    def _multiply(
        self, input: Tensor, name: str | None, w: Tensor, rule: LinearWeight, bias: Tensor | None = None
    ) -> Tensor:
        outputs = w.shape[1] if rule.transposed else w.shape[0]
        # The rule of a bias is for one number per output; one that is broadcast is added like any other tensor.
        bias_name, b = self._own(bias if bias is not None and bias.shape == (outputs,) else None)

        def compute(n: int, per_sample: list[bool], x: Tensor) -> Tensor:
            x = rows(x, per_sample[0], n)
            # Flat, because the output of a matrix product is not a view, so in-place changes of it come after its edge.
            y = F.linear(x.flatten(0, -2), w.t() if rule.transposed else w, b)
            self._note(name, w, rule, (x,), y)
            self._note(bias_name, b, Bias(-1, x.shape[1:-1].numel()), (), y)
            return y.unflatten(0, x.shape[:-1])

        y = self._below(compute, _autocast(input))
        return y if bias is None or b is not None else y + _autocast(bias)

    def _embedding(self, input: Tensor, weight: Tensor, **defaults: Any) -> Tensor:
        name, w = self._own(weight)
        if w is None:
            return F.embedding(input, weight, **defaults)

        def compute(n: int, per_sample: list[bool], ids: Tensor) -> Tensor:
            ids = rows(ids, per_sample[0], n)
            y = F.embedding(ids, w, **defaults)
            self._note(name, w, EmbeddingWeight(tuple(w.shape)), (ids,), y)
            return y

        return self._below(compute, input)

    def _convolution(self, dims: int) -> Callable[..., Tensor]:
        def convolution(
            input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
            dilation: Any = 1, groups: int = 1,
        ) -> Tensor:  # fmt: skip
            kernel = weight.shape[2:]
            input, geometry = normal_form(input, dims, stride, padding, dilation, groups, kernel=kernel)
            return self._convolve(input, weight, bias, geometry)

        return convolution

    def _transposed(self, dims: int) -> Callable[..., Tensor]:
        def transposed(
            input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
            output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
        ) -> Tensor:  # fmt: skip
            input, geometry = normal_form(
                input, dims, stride, padding, dilation, groups, kernel=weight.shape[2:],
                output_padding=output_padding, transposed=True,
            )  # fmt: skip
            return self._convolve(input, weight, bias, geometry)

        return transposed

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        dims = len(geometry.stride)
        name, w = self._own(weight)
        # The bias is added inside only for a compared weight. With any other, there may be one convolution per sample.
        bias_name, b = self._own(None if w is None else bias)
        unbatched = input.dim() == dims + 1

        def compute(n: int, per_sample: list[bool], x: Tensor, given: Tensor) -> Tensor:
            x = rows(x, per_sample[0], n)
            if w is None and per_sample[1]:  # the model computed the weight, which now differs between samples
                return per_sample_convolution(x, _autocast(given), geometry)
            given = _autocast(given) if w is None else _autocast(w)
            y: Tensor = Convolution.apply(x.flatten(0, 1), given, geometry, self._stage)
            self._note(name, w, ConvolutionWeight(tuple(given.shape), geometry), (x,), y)
            if b is not None:
                y = y + _autocast(b).view(-1, *[1] * dims)
                self._note(bias_name, b, Bias(2, x.shape[1]), (), y)
            return y.unflatten(0, x.shape[:2])

        y = self._below(compute, _autocast(input.unsqueeze(0) if unbatched else input), weight)
        if bias is not None and b is None:
            y = y + _autocast(bias).view(-1, *[1] * dims)
        return y.squeeze(0) if unbatched else y

    def _scaled(self, x: Tensor, scale: Tensor | None, shift: Tensor | None, dim: int) -> Tensor:
        if scale is None and shift is None:
            return x.clone()  # `Standardize` keeps its output, and later layers may write into this one
        channels = x.shape[dim]
        scale = x.new_ones(channels) if scale is None else scale
        shift = x.new_zeros(channels) if shift is None else shift

        def compute(n: int, per_sample: list[bool], x: Tensor, *channel: Tensor) -> Tensor:
            x = rows(x, per_sample[0], n)
            scale, shift = (rows(values, each, n) for values, each in zip(channel, per_sample[1:], strict=False))
            before, after = x.shape[1 : dim + 1].numel(), x.shape[dim + 2 :].numel()
            y: Tensor = ChannelAffine.apply(x.reshape(n, before, channels, after), scale, shift)
            return y.view(x.shape)

        return self._below(compute, x, scale, shift)

    def _standardized(self, x: Tensor, dims: int, eps: float) -> Tensor:
        def compute(n: int, per_sample: list[bool], x: Tensor) -> Tensor:
            x = rows(x, per_sample[0], n)
            y: Tensor = Standardize.apply(x.reshape(-1, x.shape[-dims:].numel()), eps)[0]
            return y.view(x.shape)

        return self._below(compute, x)

    def _group_norm(
        self, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        per_group = input[0].numel() // max(1, num_groups)
        # Torch raises its own error for such arguments; on CUDA, autocast chooses the dtype.
        if per_group < 2 or input.shape[1] % num_groups or (input.is_cuda and torch.is_autocast_enabled("cuda")):
            return F.group_norm(input, num_groups, weight, bias, eps)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        y = self._standardized(wide.reshape(-1, num_groups, per_group), 1, eps).view(input.shape)
        return self._scaled(y, weight, bias, 1).to(input.dtype)

    def _relu(self, input: Tensor, inplace: bool = False) -> Tensor:
        return F.relu(input, inplace=True) if inplace else self._leaky_relu(input, 0.0)

    def _leaky_relu(self, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
        if inplace:
            return F.leaky_relu(input, negative_slope, inplace=True)

        def compute(n: int, per_sample: list[bool], x: Tensor) -> Tensor:
            y: Tensor = LeakyRelu.apply(rows(x, per_sample[0], n), negative_slope)
            return y

        return self._below(compute, input)

    def _requires_grad(self, tensor: Tensor) -> bool:
        """Returns the true ``requires_grad``. Under vmap it is False, so ``if h.requires_grad`` would skip a hook.

        Below another transform inside the model, such as ``torch.func.grad``, its own answer counts first.
        """
        if tensor.requires_grad:
            return True
        answer: list[bool] = []

        def compute(n: int, per_sample: list[bool], x: Tensor) -> Tensor:
            answer.append(x.requires_grad)
            return x.new_empty(n)

        self._below(compute, tensor)
        return answer[0]

    def _cross_entropy(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes in float32 under autocast, which does not see cross-entropy under vmap, where it is decomposed."""
        wide = torch.is_autocast_enabled(input.device.type) and input.dtype in (torch.float16, torch.bfloat16)
        return F.cross_entropy(input.float() if wide else input, *args, **kwargs)


def refuse_nodes(tensor: Tensor) -> None:
    """Refuses to give a tensor's node of the graph to the model: the hooks of a node do not run under vmap.

    Backward hooks of the old form (`register_backward_hook`) and `register_multi_grad_hook` ask for it, too.
    """
    raise RuntimeError("the model asks for `grad_fn`, to hook a node of the graph or to look at it")


def _autocast(tensor: Tensor) -> Tensor:
    """Casts a tensor as autocast would for a matrix product."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor
