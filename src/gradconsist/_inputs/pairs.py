"""Checks of the arguments of a call. Each error names the argument, says what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist._inputs.batch import check_alike, check_inputs, in_order_of, leaves, map_leaves, places, take
from gradconsist._inputs.cross_entropy import DENSE, REGRESSION, SEVERAL_LABELS
from gradconsist._inputs.precision import in_float64, wide
from gradconsist.errors import (
    ConfigError,
    DeviceError,
    InputShapeError,
    InputTypeError,
    InputValueError,
    NonFiniteError,
)
from gradconsist.types import Inputs


@dataclass(frozen=True)
class Pairs:
    """The checked arguments of a call: B pairs on one device.

    Attributes:
        weak: weak views.
        strong: strong views.
        target: targets, [B, ...], without a graph.
        weight: [B], in float32 at least.
        device: their common device.
    """

    weak: Inputs
    strong: Inputs
    target: Tensor
    weight: Tensor
    device: torch.device

    def __len__(self) -> int:
        return self.target.shape[0]

    def first(self) -> Pairs:
        """Returns the first pair of positive weight (the first pair if there is none), with weight 1."""
        positive = self.weight.detach().nonzero().flatten()
        index = positive[:1] if len(positive) else positive.new_zeros(1)
        weight = torch.ones_like(self.weight[index].detach())
        weak, strong = take(self.weak, index), take(self.strong, index)
        return replace(self, weak=weak, strong=strong, target=self.target[index], weight=weight)


def check_pairs(
    model: nn.Module, weak: Any, strong: Any, target: Any, weight: Any, *, default_loss: bool, fused: bool
) -> Pairs:
    """Checks and normalises the arguments of a call; if it is `fused`, they cannot get a gradient."""
    weak, strong = check_inputs("weak", weak), check_inputs("strong", strong)
    check_alike("weak", weak, "strong", strong)
    strong = in_order_of(weak, strong)
    size = leaves(weak)[0].shape[0]
    if leaves(strong)[0].shape[0] != size:
        raise InputShapeError(
            f"`weak` has {size} samples and `strong` {leaves(strong)[0].shape[0]}: row i of both must be one input."
        )
    both = [*places("weak", weak), *places("strong", strong)]
    named = {place: member for place, member in both if isinstance(member, Tensor)}
    for name, leaf in named.items():
        if leaf.dtype == torch.uint8 and name in ("weak", "strong"):  # elsewhere it may be a mask
            last = leaf.dim() == 4 and leaf.shape[-1] in (1, 3, 4) and leaf.shape[1] not in (1, 3, 4)
            order = " These are channels-last images: also pass `x.permute(0, 3, 1, 2)`." if last else ""
            raise InputTypeError(
                f"`{name}` is uint8: convert images to float and normalise them as in training.{order}"
            )
        if fused and leaf.requires_grad:
            raise ConfigError(
                f"`{name}` requires grad, but `fused=True` forms gradients for the model's parameters only: pass"
                " `fused=False`, or detach it."
            )
    # Inference tensors cannot be saved for a derivative; their copies can.
    weak, strong = (map_leaves(lambda leaf: leaf.clone() if leaf.is_inference() else leaf, v) for v in (weak, strong))
    others = {name: value for name, value in (("target", target), ("weight", weight)) if isinstance(value, Tensor)}
    device = check_one_device(model, named | others)  # before a number is read, which a meta tensor does not have
    target = check_target(target, size, default_loss)
    weight = check_weight(weight, target, fused)
    return Pairs(weak, strong, target, weight, device)


def check_target(target: Any, size: int, default_loss: bool) -> Tensor:
    """Checks the target and detaches it: `size` rows, and for the default loss classes or probabilities."""
    if not isinstance(target, Tensor):
        raise InputTypeError(
            f"`target` is of type {type(target).__name__}, not a tensor: pass class indices or probabilities (for NumPy"
            " arrays: torch.from_numpy)."
        )
    if target.dim() == 0 or target.shape[0] != size:
        raise InputShapeError(
            f"`target` has shape {tuple(target.shape)}, but there are {size} pairs: pass one row per pair."
        )
    target = target.clone() if target.is_inference() else target.detach()
    if not default_loss:
        return target
    if target.is_floating_point():
        if target.dim() != 2:
            example = REGRESSION if target.dim() == 1 else "for other targets pass `loss_fn=`, one loss per sample"
            raise InputTypeError(
                f"`target` is {target.dtype} of shape {tuple(target.shape)}: class indices must be integers [B]"
                f" (`target.long()`), probabilities floating point [B, C]; {example}."
            )
        _check_probabilities(target)
        return target
    if target.dtype == torch.bool or target.is_complex() or target.dim() != 1:
        binary = target.dtype == torch.bool or (target.dim() == 2 and bool(((target == 0) | (target == 1)).all()))
        examples = f"; {SEVERAL_LABELS if binary else DENSE}" if target.dim() > 1 and not target.is_complex() else ""
        raise InputTypeError(
            f"`target` is {target.dtype} of shape {tuple(target.shape)}: pass class indices [B] (an integer type) or"
            f" probabilities [B, C] (a floating type){examples}."
        )
    if bool((target < 0).any()):
        raise InputValueError(
            f"`target` has the negative class {int(target.min())}: give such pairs weight 0 and any valid class."
        )
    return target.long()


def _check_probabilities(target: Tensor) -> None:
    if not bool(torch.isfinite(target).all()):
        raise NonFiniteError("`target` has NaN or infinite entries: pass probabilities.")
    total = in_float64(target).sum(1)
    # The sum of C rounded entries is off by up to C / 2 units in the last place.
    tolerance = max(1e-3, target.shape[1] * torch.finfo(target.dtype).eps)
    if bool((target < 0).any()) or bool(((total - 1).abs() > tolerance).any()):
        binary = bool(((target == 0) | (target == 1)).all())
        examples = SEVERAL_LABELS if binary else REGRESSION
        raise InputValueError(
            f"`target` rows are not probabilities (non-negative, sum 1), which the default loss takes: {examples}; for"
            " soft pseudo-labels pass the model's `.softmax(1)`."
        )


def check_weight(weight: Any, target: Tensor, fused: bool) -> Tensor:
    """Checks the weights [B] of a checked target and returns them in float32 at least; ones for None."""
    if weight is None:
        return torch.ones(target.shape[0], device=target.device)
    if not isinstance(weight, Tensor) or weight.is_complex():
        found = "a complex tensor" if isinstance(weight, Tensor) else f"of type {type(weight).__name__}"
        raise InputTypeError(
            f"`weight` is {found}: pass a real or boolean tensor [B] (for NumPy arrays: torch.from_numpy)."
        )
    if weight.shape != target.shape[:1]:
        raise InputShapeError(
            f"`weight` has shape {tuple(weight.shape)}, expected ({target.shape[0]},): pass one weight per pair."
        )
    if fused and weight.requires_grad:
        raise ConfigError(
            "`weight` requires grad, but `fused=True` forms gradients for the model's parameters only: detach it, or"
            " pass `fused=False`."
        )
    weight = wide(weight)
    values = weight.detach()
    if bool(((values >= 0) & (values < torch.inf)).all()):  # one read, as a GPU's host waits for each
        return weight
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("`weight` has NaN or infinite entries: pass finite, non-negative numbers.")
    raise InputValueError(f"`weight` has the negative entry {float(values.min()):g}: pass non-negative numbers.")


def non_finite_tensor(model: nn.Module, weak: Inputs, strong: Inputs) -> str | None:
    """Names the first input, parameter or buffer with NaN or infinite entries; None if all are finite."""
    suspects: list[tuple[str, Sequence[Tensor]]] = [("`weak`", leaves(weak)), ("`strong`", leaves(strong))]
    suspects += [(f"parameter {name!r} of `model`", [parameter]) for name, parameter in model.named_parameters()]
    suspects += [(f"buffer {name!r} of `model`", [buffer]) for name, buffer in model.named_buffers()]
    for name, tensors in suspects:
        if any(not bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return name
    return None


def check_one_device(model: nn.Module, tensors: dict[str, torch.Tensor]) -> torch.device:
    """Checks that model and inputs (by their names) are on one device, not the meta device, and returns it."""
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) != 1:
        raise DeviceError(
            f"the parameters of `model` are on {sorted(places)}: move them to one device, since a split model is not"
            " supported."
        )
    device = next(model.parameters()).device
    if device.type == "meta":
        raise DeviceError(
            "`model` is on the meta device, where there are no numbers: move it with `.to_empty()` and load."
        )
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise DeviceError(f"`{name}` is on {tensor.device}, the model on {device}: move it there.")
    return device
