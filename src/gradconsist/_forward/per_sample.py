"""Runs the user's model and loss so that each per-sample loss depends on its own sample only.

`PerSampleForward` calls the model on a batch and returns one loss per sample, under these rules:

- BatchNorm uses constant statistics (`batchnorm`), and InstanceNorm does not update its running ones;
- dropout and other random layers are off, unless asked for;
- the model gets copies of its buffers, so the user's buffers cannot change;
- operators whose second derivative is missing or wrong in torch are computed with another formula: fused attention,
  mkldnn and cuDNN recurrent layers, `weight_norm`, `hardsigmoid`, norms of zero vectors, and under vmap LayerNorm and
  InstanceNorm.

Modes, flags and attributes are restored afterwards, even after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradconsist._forward.batchnorm import BatchNormCalls
from gradconsist._forward.exact_operators import EXACT, WITHOUT_DROPOUT
from gradconsist._forward.functional_call import call_with, copied
from gradconsist._forward.remembered import nothing_kept
from gradconsist._inputs.batch import leaves, map_leaves
from gradconsist._inputs.model_with_loss import ModelWithLoss
from gradconsist._inputs.precision import wide
from gradconsist.errors import LossContractError
from gradconsist.types import Inputs, LossFunction


class _ComparisonMode(TorchFunctionMode):
    """Replaces some torch functions while the user's forward runs."""

    def __init__(self, batchnorm: BatchNormCalls, *, dropout: bool, counters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        # Counters of batches are copies, so adding to one matters only if something in the forward reads it.
        self._counters = {id(counter): counter for counter in counters}
        self._pending: dict[int, Tensor] = {}
        self._rules: dict[Any, Callable[..., Any]] = {
            F.batch_norm: batchnorm,
            torch.batch_norm: batchnorm.torch_batch_norm,
            **EXACT,
        }
        if not dropout:
            self._rules |= WITHOUT_DROPOUT
        # An exported model calls the same functions by these names.
        exported = ("batch_norm", "instance_norm", "layer_norm", "_weight_norm", "dropout", "feature_dropout")
        for name in (*exported, "embedding", "embedding_bag", "select_scatter"):
            rule, packet = self._rules.get(getattr(torch, name)), getattr(torch.ops.aten, name)
            if rule is not None:
                self._rules |= {packet: rule, packet.default: rule}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.add_ and id(args[0]) in self._counters and args[1:] == (1,) and not kwargs:
            self._pending[id(args[0])] = args[0]
            return args[0]
        if self._pending:
            for each in tree_leaves((args, kwargs)):
                if id(each) in self._pending:
                    self._pending.pop(id(each)).add_(1)
        return self._rules.get(func, func)(*args, **(kwargs or {}))


class PerSampleForward:
    """Computes per-sample losses of a batch with the user's model and loss.

    Args:
        model: the user's model.
        loss_fn: ``(output, target) -> [B]``.
        batchnorm: replacement for BatchNorm calls.
        parameters: replacements for the model's parameters by name; None for no replacements.
        dropout: whether random layers stay on.
        autocast: device type and dtype of the caller's autocast region, or None.
        loss_scale: factor on the losses, so that float16 gradients do not underflow; it does not change the cosine.
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
        """Returns the model's output; with `record`, also records BatchNorm statistics."""
        return self._run(inputs, None, {}, view, record=record)[0]

    def losses(
        self,
        inputs: Inputs,
        target: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        view: Tensor | int | None = None,
    ) -> Tensor:
        """Computes losses [B], times `loss_scale`, in float32 at least, with `parameters` in place of the model's.

        `view`: see `gradconsist.engines.base.Losses`.
        """
        _, value = self._run(inputs, target, parameters or {}, view)
        if not isinstance(value, Tensor) or value.shape != target.shape[:1] or not value.is_floating_point():
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise LossContractError(
                f"`loss_fn` returned {found}, expected one loss per sample, shape {tuple(target.shape[:1])}: use"
                " reduction='none' and reduce over everything but the batch (each sample comes as a batch of one)."
            )
        return wide(value) if self.loss_scale == 1.0 else wide(value) * self.loss_scale

    def _run(
        self,
        inputs: Inputs,
        target: Tensor | None,
        parameters: Mapping[str, Tensor],
        view: Tensor | int | None = None,
        *,
        record: bool = False,
    ) -> tuple[Any, Any]:
        # Copies, since a forward may write into its inputs (`x.sub_(mean)`) and buffers (step counts).
        inputs = inputs if record else map_leaves(torch.clone, inputs)  # those of a record were put together for it
        state = copied(dict(self._both.named_buffers()))
        state |= {f"model.{name}": tensor for name, tensor in {**self.parameters, **parameters}.items()}
        self.batchnorm.start_forward(len(leaves(inputs)[0]), view, record=record)
        with ExitStack() as stack:
            counters = (value for name, value in state.items() if name.endswith(".num_batches_tracked"))
            stack.enter_context(_ComparisonMode(self.batchnorm, dropout=self.dropout, counters=counters))
            if self.autocast is not None:
                device, dtype = self.autocast
                # No cached casts: a cast cached under no_grad would silently cut the graph of a later forward.
                stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
            stack.enter_context(nothing_kept(self._both))
            result: tuple[Any, Any] = call_with(self._both, state, (inputs, target))
        self.batchnorm.finish_forward()
        return result
