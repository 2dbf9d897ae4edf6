"""Sees each call of an operator with a compared parameter while the forward runs, batched, under `torch.func.vmap`.

Inside, each compared parameter is represented by a stand-in: the parameter expanded, without a copy, to one row per
sample. Whatever the model does with it is exact, since the gradient for the rows is the per-sample gradient. That is
the fallback, by construction, for any use that is not known here. Where an operator with a rule meets a stand-in, it is
computed with the parameter itself, for all samples at once, and remembered with its input and the gradient edge of its
output. Which dimension holds the samples is never guessed: vmap keeps track of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from gradconsist.engines.ghost.conv import Convolution, Geometry, Stage, normal_form, per_sample_convolution
from gradconsist.engines.ghost.decomposed import RECURRENT, body
from gradconsist.engines.ghost.layers import LayerCall, LayerGradients, LayerParameter, WithState
from gradconsist.engines.ghost.pointwise import ChannelAffine, LeakyRelu
from gradconsist.engines.ghost.rules import Bias, ConvolutionWeight, EmbeddingWeight, LinearWeight, Rule
from gradconsist.errors import UnsupportedModuleError
from gradconsist.normalization import Statistics, affine
from gradconsist.recall import CONVOLUTIONS, Recalled

Compute = Callable[..., Any]


@dataclass(frozen=True)
class Use:
    """One call of an operator with a compared parameter.

    Attributes:
        parameter: its name.
        rule: how its gradient follows from input and output gradient.
        inputs: what the operator saw, [N, ...] each; none where the rule does not need it.
        versions: of the inputs, to notice that one was overwritten.
        output: where the gradient of the output will arrive.
        own: the node of the parameter's alias that only this use has.
    """

    parameter: str
    rule: Rule
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    output: GradientEdge
    own: Any

    @property
    def input(self) -> Tensor | None:
        """The first input."""
        return self.inputs[0] if self.inputs else None


class _Below(torch.autograd.Function):
    """Runs `compute(samples, per_sample, *tensors)` below vmap, on plain tensors.

    A tensor with a row a sample comes with the samples in front, and ``True`` in `per_sample`; others as they are.
    """

    @staticmethod
    def forward(compute: Compute, *tensors: Tensor) -> Any:
        raise RuntimeError("no tensor with a row a sample: an anchor should have been among the arguments")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        del ctx, inputs, output

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], compute: Compute, *tensors: Tensor) -> tuple[Any, Any]:
        dims = in_dims[1:]
        moved = [tensor if dim is None else tensor.movedim(dim, 0) for tensor, dim in zip(tensors, dims, strict=True)]
        result = compute(info.batch_size, [dim is not None for dim in dims], *moved)
        return result, (0,) * len(result) if isinstance(result, tuple) else 0


class Capture(TorchFunctionMode):
    """The mode; `uses` fills while a forward runs.

    Args:
        parameters: the compared parameters, E, by name.
        stand_ins: what the model has in their place, by the same names.
        stage: told to the convolutions.
        uses: added to.
        recalled: what convolutions returned for these samples in an earlier forward, or None.

    Attributes:
        convolutions: calls of convolutions so far.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        stand_ins: Mapping[str, Tensor],
        stage: Stage,
        uses: list[Use],
        recalled: Recalled | None = None,
    ) -> None:
        super().__init__()
        self._names = {id(stand_in): name for name, stand_in in stand_ins.items()}
        self._parameters = parameters
        self._anchor = next(iter(stand_ins.values()))  # any tensor with a row a sample
        self._stage = stage
        self._paused = False
        self._uses = uses
        self._recalled = recalled
        self.convolutions = 0
        self._rules: dict[Any, Callable[..., Any]] = {
            F.linear: self._linear,
            F.embedding: self._embedding,
            affine: self._affine,
            **{getattr(torch, f"conv{d}d"): self._convolution(d) for d in (1, 2, 3)},
            **{getattr(torch, f"conv_transpose{d}d"): self._transposed(d) for d in (1, 2, 3)},
            **dict.fromkeys((F.relu, torch.relu, Tensor.relu), self._relu),
            F.leaky_relu: self._leaky_relu,
            F.multi_head_attention_forward: self._inside(body(F.multi_head_attention_forward)),
            **{function: self._inside(replacement) for function, replacement in RECURRENT.items()},
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._paused:
            self.convolutions += func in CONVOLUTIONS
            return func(*args, **(kwargs or {}))
        return self._rules.get(func, func)(*args, **(kwargs or {}))

    def layer(
        self, module: nn.Module, rule: LayerGradients, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a layer that has a registered rule, for all samples as one batch.

        Args:
            module: the layer.
            rule: its rule.
            forward: its forward.
            *args: what it was called with.
            **kwargs: what it was called with.

        Returns:
            Its output.
        """
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        own = {local: self._own(tensor) for local, tensor in state.items() if id(tensor) in self._names}
        if self._paused or not own or kwargs or not all(isinstance(value, Tensor) for value in args):
            return forward(*args, **kwargs)
        state |= {local: alias for local, (_, alias) in own.items() if alias is not None}

        def compute(n: int, per_sample: list[bool], *inputs: Tensor) -> Tensor:
            rows = tuple(_rows(x, each, n).flatten(0, 1) for x, each in zip(inputs, per_sample, strict=False))
            maps = rows[0].shape[0] // n
            self._paused = True
            try:
                y = WithState(module, forward).run(state, *rows)
            finally:
                self._paused = False
            if not isinstance(y, Tensor):
                raise UnsupportedModuleError(
                    f"{type(module).__name__}, which has a registered rule, returned a {type(y).__name__}: a rule needs"
                    " a layer that returns one tensor. Take the rule back by `unregister_rule`."
                )
            y = y.clone() if y._is_view() else y
            call = LayerCall(module, rule, state, rows, maps)
            for local, (name, alias) in own.items():
                self._note(name, alias, LayerParameter(call, local), rows, y)
            return y.unflatten(0, (n, maps))

        return self._below(compute, *args)

    def one_by_one(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a layer that vmap refuses, sample by sample; its parameters have a row a sample, so it stays exact.

        Args:
            module: the layer.
            forward: its forward.
            *args: what it was called with.
            **kwargs: what it was called with.

        Returns:
            Its output, of any structure of tensors.
        """
        if self._paused:
            return forward(*args, **kwargs)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        given, form = tree_flatten((args, kwargs, state))
        places = [place for place, value in enumerate(given) if isinstance(value, Tensor)]
        output_form: list[Any] = []

        def compute(n: int, per_sample: list[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
            before, self._paused = self.convolutions, True
            columns = [x.unbind(0) if each else (x,) * n for x, each in zip(tensors, per_sample, strict=False)]
            outputs = []
            try:
                for row in zip(*columns, strict=True):
                    self.convolutions = before
                    filled = list(given)
                    for place, tensor in zip(places, row, strict=True):
                        filled[place] = tensor
                    own_args, own_kwargs, own_state = tree_unflatten(filled, form)
                    output = WithState(module, forward).run(own_state, *own_args, **own_kwargs)
                    flat, output_form[:] = _flat_tensors(module, output)
                    outputs.append(flat)
            finally:
                self._paused = False
            return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))

        flat = self._below(compute, *(given[place] for place in places))
        return tree_unflatten(list(flat), output_form[0])

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with the calls that it makes seen too."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run

    def _own(self, tensor: Any) -> tuple[str | None, Tensor | None]:
        """Name and parameter behind a stand-in, or None twice. An alias of its own tells this use from others."""
        name = self._names.get(id(tensor))
        return name, None if name is None else self._parameters[name].view_as(self._parameters[name])

    def _note(self, name: str | None, alias: Tensor | None, rule: Rule, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        if name is not None and alias is not None:
            versions = tuple(x._version for x in inputs)
            self._uses.append(Use(name, rule, inputs, versions, get_gradient_edge(y), alias.grad_fn))

    def _below(self, compute: Compute, *tensors: Tensor) -> Any:
        """`compute(samples, per_sample, *tensors)` on plain tensors."""
        result = _Below.apply(lambda n, flags, *plain: compute(n, flags, *plain[:-1]), *tensors, self._anchor)
        return result

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        name, w = self._own(weight)
        if w is None or w.dim() != 2:
            return F.linear(input, weight, bias)
        bias_name, b = self._own(bias)

        def compute(n: int, per_sample: list[bool], x: Tensor) -> Tensor:
            x = _rows(x, per_sample[0], n)
            # Flat, because the output of a matrix product is no view: what is done to it in place comes after its edge.
            y = F.linear(x.flatten(0, -2), w, b)
            self._note(name, w, LinearWeight(), (x,), y)
            self._note(bias_name, b, Bias(-1, x.shape[1:-1].numel()), (), y)
            return y.unflatten(0, x.shape[:-1])

        y = self._below(compute, _autocast(input))
        return y if bias is None or b is not None else y + _autocast(bias)

    def _embedding(self, input: Tensor, weight: Tensor, padding_idx: int | None = None, **options: Any) -> Tensor:
        name, w = self._own(weight)
        if w is None:
            return F.embedding(input, weight, padding_idx, **options)
        padding = w.shape[0] + padding_idx if padding_idx is not None and padding_idx < 0 else padding_idx

        def compute(n: int, per_sample: list[bool], ids: Tensor) -> Tensor:
            ids = _rows(ids, per_sample[0], n)
            y = F.embedding(ids, w, padding_idx, **options)
            self._note(name, w, EmbeddingWeight(tuple(w.shape), padding), (ids,), y)
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
        # Inside only beside a compared weight: the output of any other may be one convolution a sample.
        bias_name, b = self._own(None if w is None else bias)
        unbatched = input.dim() == dims + 1
        call, self.convolutions = self.convolutions, self.convolutions + 1

        def compute(n: int, per_sample: list[bool], x: Tensor, given: Tensor) -> Tensor:
            x = _rows(x, per_sample[0], n)
            if w is None and per_sample[1]:  # made by the model from parameters: a weight for every sample
                return per_sample_convolution(x, _autocast(given), geometry)
            given = _autocast(given) if w is None else _autocast(w)
            y: Tensor = Convolution.apply(x.flatten(0, 1), given, geometry, self._stage, self._known(call, x))
            self._note(name, w, ConvolutionWeight(tuple(given.shape), geometry), (x,), y)
            if b is not None:
                y = y + _autocast(b).view(-1, *[1] * dims)
                self._note(bias_name, b, Bias(2, x.shape[1]), (), y)
            return y.unflatten(0, x.shape[:2])

        y = self._below(compute, _autocast(input.unsqueeze(0) if unbatched else input), weight)
        if bias is not None and b is None:
            y = y + _autocast(bias).view(-1, *[1] * dims)
        return y.squeeze(0) if unbatched else y

    def _known(self, call: int, x: Tensor) -> Tensor | None:
        """What the convolution that is the `call`-th of a forward returned for the samples [N, 1, ...] before."""
        recalled = self._recalled
        if recalled is None or x.shape[1] != 1 or call >= len(recalled.outputs):
            return None
        output = recalled.outputs[call]
        return None if output is None else output.index_select(0, recalled.interleaved())

    def _affine(
        self, x: Tensor, statistics: Statistics, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = torch.rsqrt(statistics.variance + eps)
        scale = scale if weight is None else scale * weight
        shift = torch.zeros_like(scale) if bias is None else bias

        def compute(n: int, per_sample: list[bool], x: Tensor, *channel: Tensor) -> Tensor:
            x = _rows(x, per_sample[0], n)
            maps = x.shape[1]
            mean, scale, shift = (
                _rows(values, each, n).unsqueeze(1).expand(n, maps, -1).reshape(n * maps, -1)
                for values, each in zip(channel, per_sample[1:], strict=False)
            )
            y: Tensor = ChannelAffine.apply(x.reshape(n * maps, x.shape[2], -1), mean, scale, shift)
            return y.view(x.shape)

        return self._below(compute, x.to(wide), statistics.mean, scale, shift).to(x.dtype)

    def _relu(self, input: Tensor, inplace: bool = False) -> Tensor:
        return F.relu(input, inplace=True) if inplace else self._leaky_relu(input, 0.0)

    def _leaky_relu(self, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
        if inplace:
            return F.leaky_relu(input, negative_slope, inplace=True)

        def compute(n: int, per_sample: list[bool], x: Tensor) -> Tensor:
            y: Tensor = LeakyRelu.apply(_rows(x, per_sample[0], n), negative_slope)
            return y

        return self._below(compute, input)


def _flat_tensors(module: nn.Module, output: Any) -> tuple[list[Tensor], list[Any]]:
    flat, form = tree_flatten(output)
    if not all(isinstance(leaf, Tensor) for leaf in flat):
        raise RuntimeError(f"{type(module).__name__} returns something else than tensors, and vmap refuses it")
    return flat, [form]


def _rows(tensor: Tensor, per_sample: bool, count: int) -> Tensor:
    return tensor if per_sample else tensor.expand(count, *tensor.shape)


def _autocast(tensor: Tensor) -> Tensor:
    """As autocast would hand it to a matrix product."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor
