"""The forward that is compared: the user's model, evaluated so that each sample stands for itself.

`PerSampleForward` calls the model on a batch and returns one loss per sample, under these rules:

- BatchNorm uses constant statistics (`normalization`), InstanceNorm does not update its running ones;
- dropout and other random layers are off, unless asked for;
- buffers are handed to the model as copies, so that none of the user's can change;
- operators whose second derivative is missing or wrong in torch are computed by another formula: fused attention,
  mkldnn and cuDNN recurrent layers, `weight_norm`, `hardsigmoid`, norms of zero vectors, and under vmap LayerNorm and
  InstanceNorm.

Modes, flags and attributes are restored on the way out, whatever happens inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gradconsist.batch import leaves
from gradconsist.errors import LossContractError, UnsupportedModuleError
from gradconsist.isolation import as_written
from gradconsist.normalization import BatchNormCalls, Statistics, affine, scaled, standardized
from gradconsist.norms import NORMS
from gradconsist.precision import wide
from gradconsist.remembered import nothing_kept
from gradconsist.replacement import call_with
from gradconsist.types import Inputs, LossFunction
from gradconsist.with_loss import ModelWithLoss

# Functions whose first argument is returned unchanged while dropout is off.
_DROPOUTS = [
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_),
    *(torch.alpha_dropout, torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_),
]
_ATTENTION_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


class _ComparisonMode(TorchFunctionMode):
    """Replaces single torch functions while the user's forward runs; everything else passes through."""

    def __init__(self, batchnorm: BatchNormCalls, *, dropout: bool) -> None:
        super().__init__()
        self._rules: dict[Any, Callable[..., Any]] = {
            F.batch_norm: batchnorm,
            torch.batch_norm: batchnorm.torch_batch_norm,
            F.instance_norm: _instance_norm,
            torch.instance_norm: _torch_instance_norm,
            F.layer_norm: _layer_norm,
            torch.layer_norm: _layer_norm,
            torch._weight_norm: _weight_norm,
            F.hardsigmoid: _hardsigmoid,
            F.embedding: _embedding,
            F.embedding_bag: _embedding_bag,
            **NORMS,
        }
        if not dropout:
            self._rules |= dict.fromkeys(_DROPOUTS, lambda input, *args, **kwargs: input)
            self._rules[F.multi_head_attention_forward] = _attention_without_dropout
            self._rules[F.scaled_dot_product_attention] = _scaled_attention_without_dropout
        # The same functions as an exported model calls them.
        for name in ("batch_norm", "instance_norm", "layer_norm", "_weight_norm", "dropout", "feature_dropout"):
            rule, packet = self._rules.get(getattr(torch, name)), getattr(torch.ops.aten, name)
            if rule is not None:
                self._rules |= {packet: rule, packet.default: rule}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._rules.get(func, func)(*args, **(kwargs or {}))


# torch.func.vmap drops the derivative through mean and variance from the second derivative of the fused LayerNorm and
# InstanceNorm, in silence (seen in torch 2.13 and 2.15 on CPU; the loop is right). By formula both are right.


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
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # torch tells what is wrong
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
    """InstanceNorm from the input's own statistics, without the write to the running ones; else the affine map."""
    del momentum
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise UnsupportedModuleError("InstanceNorm without input statistics needs running ones: none are there.")
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
    """``v * g / ||v||``: the second derivative of torch's fused form is wrong, in silence (seen in torch 2.13)."""
    if dim == -1:
        return v * (g / torch.linalg.vector_norm(v))
    others = [other for other in range(v.dim()) if other != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``clamp(x / 6 + 1 / 2, 0, 1)``, whose fused form has no second derivative in torch."""
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
    del sparse  # a sparse gradient has no inner products that can be differentiated; the value is the same
    return F.embedding(input, weight, padding_idx, None, norm_type, False, False)


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


@contextmanager
def comparison_scope(model: nn.Module, *, dropout: bool) -> Iterator[None]:
    """Flags of torch and of `model` as the comparison needs them; as they were, on the way out.

    Random layers are told from others by what they are: a module in train mode without parameters, buffers and
    children has nothing to learn or to remember, so what training changes in it is chance (dropout, stochastic depth,
    noise). Those go to eval mode. Recurrent layers hold dropout of their own.

    What a forward assigns to attributes (features that it keeps, counters, the weight that an old weight_norm hook
    sets) is put back too: under vmap it would be a tensor that is dead outside. Objects that it changes in place, and
    what the user's own hooks collect, are the user's.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(as_written())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused forms cannot be differentiated twice
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_native_recurrence())
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module, _ in attributes:
                if module.training and not dropout and (_is_bare(module) or isinstance(module, nn.RNNBase)):
                    module.training = False
            yield
        finally:
            for module, before in attributes:
                vars(module).clear()
                vars(module).update(before)
            torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def _native_recurrence() -> Iterator[None]:
    """Torch's own recurrent kernels: neither those of mkldnn nor those of cuDNN can be differentiated twice."""
    # Not `mkldnn.flags(...)`: that context also writes float32 precision flags, which it warns about or leaves changed.
    mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
        yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch._C._set_cudnn_enabled(cudnn)


def _is_bare(module: nn.Module) -> bool:
    return not (module._parameters or module._buffers or module._modules)


class PerSampleForward:
    """The user's model and loss as a function from a batch to per-sample losses.

    Args:
        model: the user's model.
        loss_fn: ``(output, target) -> [B]``.
        batchnorm: what answers the BatchNorm calls.
        parameters: stand-ins for the model's parameters, by name; None for the model's own.
        dropout: whether random layers stay as they are.
        autocast: device type and dtype of the caller's autocast region, or None.
        loss_scale: factor on the losses, so that float16 gradients do not underflow; the cosine does not see it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batchnorm: BatchNormCalls,
        *,
        parameters: Mapping[str, Tensor] | None = None,
        dropout: bool = False,
        autocast: tuple[str, torch.dtype] | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.batchnorm = batchnorm
        self.parameters = dict(parameters or {})
        self.dropout = dropout
        self.autocast = autocast
        self.loss_scale = loss_scale
        self._both = ModelWithLoss(model, loss_fn)

    def output(self, inputs: Inputs, view: int | None = None, *, record: bool = False) -> Any:
        """The model's output; with `record`, takes BatchNorm statistics on the way."""
        return self._run(inputs, None, {}, view, record=record)[0]

    def losses(
        self,
        inputs: Inputs,
        target: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        view: Tensor | int | None = None,
    ) -> Tensor:
        """Losses [B] (times `loss_scale`), with `parameters` in place of the model's own.

        Args:
            inputs: samples, batch first.
            target: targets, batch first.
            parameters: replacements by name.
            view: see `gradconsist.engines.base.Losses`.

        Returns:
            Losses [B], in float32 at least.

        Raises:
            LossContractError: `loss_fn` returned something else than one real number per sample.
        """
        _, value = self._run(inputs, target, parameters or {}, view)
        if not isinstance(value, Tensor) or value.shape != target.shape[:1] or not value.is_floating_point():
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise LossContractError(
                f"`loss_fn` returned {found}, expected one loss per sample, shape {tuple(target.shape[:1])}: use"
                " reduction='none' and reduce over everything but the batch (each sample comes as a batch of one)."
            )
        return wide(value) * self.loss_scale

    def _run(
        self,
        inputs: Inputs,
        target: Tensor | None,
        parameters: Mapping[str, Tensor],
        view: Tensor | int | None = None,
        *,
        record: bool = False,
    ) -> tuple[Any, Any]:
        # Copies: a forward that writes into its buffers (step counts, running statistics) writes into these.
        state = {name: buffer.clone() for name, buffer in self._both.named_buffers()}
        state |= {f"model.{name}": tensor for name, tensor in {**self.parameters, **parameters}.items()}
        self.batchnorm.start_forward(len(leaves(inputs)[0]), view, record=record)
        with ExitStack() as stack:
            stack.enter_context(_ComparisonMode(self.batchnorm, dropout=self.dropout))
            if self.autocast is not None:
                device, dtype = self.autocast
                # No cached casts: a cast cached under no_grad would cut the graph in a later forward, in silence.
                stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
            stack.enter_context(nothing_kept(self._both))
            result: tuple[Any, Any] = call_with(self._both, state, (inputs, target))
        self.batchnorm.finish_forward()
        return result
