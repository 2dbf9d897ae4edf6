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

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradconsist._forward.batchnorm import BatchNormCalls
from gradconsist._forward.exact_operators import EXACT, WITHOUT_DROPOUT
from gradconsist._forward.functional_call import call_with
from gradconsist._forward.remembered import nothing_kept
from gradconsist._inputs.batch import leaves
from gradconsist._inputs.model_with_loss import ModelWithLoss
from gradconsist._inputs.precision import wide
from gradconsist.errors import LossContractError
from gradconsist.types import Inputs, LossFunction


class _ComparisonMode(TorchFunctionMode):
    """Replaces single torch functions while the user's forward runs; everything else passes through."""

    def __init__(self, batchnorm: BatchNormCalls, *, dropout: bool) -> None:
        super().__init__()
        self._rules: dict[Any, Callable[..., Any]] = {
            F.batch_norm: batchnorm,
            torch.batch_norm: batchnorm.torch_batch_norm,
            **EXACT,
        }
        if not dropout:
            self._rules |= WITHOUT_DROPOUT
        # The same functions as an exported model calls them.
        for name in ("batch_norm", "instance_norm", "layer_norm", "_weight_norm", "dropout", "feature_dropout"):
            rule, packet = self._rules.get(getattr(torch, name)), getattr(torch.ops.aten, name)
            if rule is not None:
                self._rules |= {packet: rule, packet.default: rule}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._rules.get(func, func)(*args, **(kwargs or {}))


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
