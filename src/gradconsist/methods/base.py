"""The base class of all methods: logits, the step counter with its ramp, and state.

Index letters: n labeled and m unlabeled inputs of a step, N unlabeled inputs in all, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist._inputs.batch import call, concatenable, concatenate, leaves
from gradconsist._inputs.cross_entropy import described, find_logits
from gradconsist._inputs.options import check_choice, check_count, check_number
from gradconsist._inputs.parametrized import nothing_cached
from gradconsist._inputs.precision import wide, wide_dtype
from gradconsist._inputs.schedules import linear_ramp
from gradconsist._refusals.loading import check_keys
from gradconsist.errors import ConfigError, InputShapeError, LossContractError, StateError
from gradconsist.methods.checks import check_call, step_failure
from gradconsist.types import Inputs, SSLBatch, StepOutput, ViewPair

LogitsFunction = Callable[[Any], Tensor]


class Method(nn.Module):
    """Computes L = L_s + mu(t) * L_u with a model, and counts the steps in train mode."""

    _ramp: Callable[[int, int], float] = staticmethod(linear_ramp)

    def __init__(
        self,
        model: nn.Module,
        unlabeled_weight: float,
        unlabeled_ramp_steps: int,
        logits_fn: LogitsFunction | None,
        joint: bool = True,
    ) -> None:
        super().__init__()
        if logits_fn is not None and (not callable(logits_fn) or isinstance(logits_fn, type | nn.Module)):
            raise ConfigError(
                f"`logits_fn` is {logits_fn!r:.80}: pass a function from the model's output to logits [B, C], or None"
                " (layers belong in the model)."
            )
        self.model = model
        self.logits_fn = logits_fn
        self.unlabeled_weight = check_number("unlabeled_weight", unlabeled_weight, least=0.0)
        self.unlabeled_ramp_steps = check_count("unlabeled_ramp_steps", unlabeled_ramp_steps, least=0)
        self.joint = check_choice("joint", joint, (True, False))
        self.step = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one step, see `forward`. If torch fails, the error names the part of the batch and the layer."""
        batch = check_call(type(self).__name__, args, kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:
            refusal = step_failure(self, error, batch)
            if refusal is None:
                raise
            raise refusal from error

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restores what `state_dict` returned; arguments and result are torch's.

        Raises:
            StateError: the state belongs to something else, such as the bare model.
        """
        check_keys(self, state_dict, "method")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def ramp(self) -> float:
        """Returns the share of `unlabeled_weight` that the next step uses."""
        return self._ramp(self.step, self.unlabeled_ramp_steps)

    def _mu(self) -> float:
        return self.unlabeled_weight * self.ramp()

    def _joint_logits(self, *batches: Inputs, model: nn.Module | None = None) -> list[Tensor]:
        """Forwards batches [n_i, ...] as one, and returns the logits [n_i, C] of each, in float32 or wider."""
        if not all(concatenable(batches[0], other) for other in batches[1:]):
            shapes = " and ".join(str([tuple(leaf.shape) for leaf in leaves(batch)]) for batch in batches)
            raise InputShapeError(
                f"inputs of shapes {shapes} are forwarded as one batch: resize or pad them to one shape, or set"
                " `joint=False`, if the method has it, to forward weak and strong views separately."
            )
        sizes = [len(leaves(batch)[0]) for batch in batches]
        # A copy of a single batch, too: the model may write into it, and the pair would hold changed views.
        output = call(self.model if model is None else model, concatenate(*batches))
        # Near 0.95, bfloat16 has steps of 0.004, so a mask would flip.
        return list(wide(self._logits(output, sum(sizes))).split(sizes))

    def _logits(self, output: Any, rows: int) -> Tensor:
        """Finds the logits [rows, C] in a model's output."""
        logits = find_logits(output) if self.logits_fn is None else self.logits_fn(output)
        if isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == rows and logits.is_floating_point():
            return logits
        if self.logits_fn is not None:
            raise LossContractError(
                f"`logits_fn` returned {described(logits)} for {rows} inputs, from {described(output)}: return logits"
                " [B, C], floating point, one row per input."
            )
        raise LossContractError(
            f"the model returned {described(output if logits is None else logits)} for {rows} inputs, but a method"
            " needs logits [B, C], or an object with `logits`: pass `logits_fn=`, a function from the model's output to"
            " logits, such as `lambda output: output[0]`."
        )

    def _without_graph(self, inputs: Inputs, model: nn.Module | None = None) -> Tensor:
        """Computes logits [B, C] without a graph, in float32 or wider.

        Autocast caches half-precision copies of the weights until its context ends. In torch 2.6 to 2.8 it also caches
        copies made without a graph: the next forward would use them, and its weights would silently get no gradient
        (pytorch#112583). So the cache is cleared here. A weight of `parametrize.cached()` would lack a graph likewise.
        """
        with torch.no_grad(), nothing_cached():
            (logits,) = self._joint_logits(inputs, model=model)
        if torch.is_autocast_enabled(logits.device.type):
            torch.clear_autocast_cache()
        return logits

    def _finish(
        self, batch: SSLBatch, supervised: Tensor, unsupervised: Tensor, target: Tensor, weight: Tensor, **logs: Tensor
    ) -> StepOutput:
        """Builds the step's output with target and weight [m] of the pair, and counts the step."""
        mu = self._mu()
        if self.training:
            self.step += 1
        shown = {"loss_supervised": supervised.detach(), "loss_unsupervised": unsupervised.detach()}
        pair = ViewPair(batch.weak, batch.strong, target, weight)
        return StepOutput(supervised + mu * unsupervised, pair, {**shown, **logs, "unlabeled_weight": mu})

    @staticmethod
    def _average(old: Tensor, new: Tensor, decay: float) -> Tensor:
        """Returns d old + (1 - d) new, or `old` if that is not finite: one bad step would spoil it for good."""
        updated = decay * old + (1 - decay) * new.to(old.dtype)
        return torch.where(updated.isfinite().all(), updated, old)  # no `if`, which would wait for the device

    def _remember(self, name: str, value: Tensor) -> None:
        """Registers state on the model's device; floating-point state in the model's dtype, but at least float32."""
        like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        dtype = wide_dtype(like) if value.is_floating_point() else value.dtype
        self.register_buffer(name, value.to(device=like.device, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Method:
        # `.half()` and the like may narrow the model but not the state: a slow average does not move in 16 bits.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or not old.is_floating_point():
                continue
            if wide_dtype(new) != new.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the step counter, which is part of ``state_dict()``."""
        return {"step": self.step}

    def set_extra_state(self, state: Any) -> None:
        """Restores what `get_extra_state` returned, or raises a `StateError`; ``load_state_dict`` calls it."""
        step = state.get("step") if isinstance(state, Mapping) else None
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise StateError(f"`state_dict` holds {state!r:.80} for {type(self).__name__}: load the method's own.")
        self.step = step
