"""The default per-sample loss: cross-entropy, written so that small residuals keep their relative accuracy.

Semi-supervised methods select confident samples. Their per-sample gradient is J^T (p - t) with a tiny residual p - t.
Computed as `softmax - onehot`, its true-class entry is off by the rounding of 1, which is 6e-8 in float32. That does
not matter for a loss, but it spoils the *direction* of a gradient whose residual is 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradconsist._inputs.precision import wide
from gradconsist.errors import LossContractError

# Tasks that the default loss does not cover, each with a loss that does.
REGRESSION = (
    "for regression pass `loss_fn=lambda output, target: (output.squeeze(1) - target).square()`, or"
    " `(output - target).square().mean(1)` for several columns"
)
SEVERAL_LABELS = (
    "for several labels per sample pass `loss_fn=lambda output, target:"
    " F.binary_cross_entropy_with_logits(output, target, reduction='none').mean(1)` with a floating target"
)
DENSE = (
    "for one class per pixel or token pass `loss_fn=lambda output, target: F.cross_entropy(output, target,"
    " reduction='none').flatten(1).mean(1)`, with classes in dimension 1 of the output"
)
ONE_LOGIT = (
    "for two classes with one logit pass `loss_fn=lambda output, target:"
    " F.binary_cross_entropy_with_logits(output.flatten(), target.float(), reduction='none')`"
)


def find_logits(output: Any) -> Tensor | None:
    """Finds the logits in a model's output: the output, or its attribute or key ``logits``; None if there are none."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) else None


def described(output: Any) -> str:
    """Describes a model's output for a message, such as "a tuple (tensor [4, 3], NoneType)"."""
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)}"
    if not isinstance(output, tuple | list | Mapping):
        return f"a {type(output).__name__}"
    keys = [f"{key!r}: " for key in output] if isinstance(output, Mapping) else [""] * len(output)
    parts = output.values() if isinstance(output, Mapping) else output
    held = [key + described(part).removeprefix("a ").split(" (")[0] for key, part in zip(keys, parts, strict=True)]
    return f"a {type(output).__name__} ({', '.join(held[:6])}{', ...' if len(held) > 6 else ''})"


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Computes the cross-entropy per sample, in float32 at least.

    For class indices it is computed as

        -log softmax(z)[t] = softplus(logsumexp of the other logits - z[t])

    whose derivative is sigmoid(.) times a difference of order 1, exact to rounding for any confidence. For
    probabilities, a residual softmax(z) - t that is only rounding error counts as zero, and so does its derivative.
    This happens if the target is the view's own prediction.

    Args:
        output: logits [B, C], or an object with them as attribute or key ``logits``.
        target: class indices [B] or probabilities [B, C].
    """
    logits = find_logits(output)
    if logits is None or logits.dim() != 2:
        dims = 0 if logits is None else logits.dim()
        examples = f"; {ONE_LOGIT}; {REGRESSION}" if dims == 1 else f"; {DENSE}" if dims > 2 else ""
        raise LossContractError(
            f"the model's output is {described(output if logits is None else logits)}, not logits [B, C] or an object"
            f" with `logits`: pass `loss_fn=`, a function (output, target) that returns one loss per sample{examples}."
        )
    check_several(logits.shape[1])
    logits = wide(logits)
    if not target.is_floating_point():
        return _hard(logits, target)
    target = target.to(logits.dtype)
    # One-hot probabilities get the accuracy of a class index.
    return torch.where(target.amax(1) == 1, _hard(logits, target.argmax(1)), _soft(logits, target))


def check_several(classes: int) -> None:
    """Checks that the logits have at least two classes, which cross-entropy needs."""
    if classes == 1:
        raise LossContractError(
            "the model's output has one logit per sample, and the default loss is cross-entropy over the logits, which"
            f" is always 0 for a single logit: {ONE_LOGIT}; {REGRESSION}."
        )


def _hard(logits: Tensor, target: Tensor) -> Tensor:
    is_target = torch.arange(logits.shape[1], device=target.device) == target.unsqueeze(1)
    others = logits.masked_fill(is_target, -torch.inf).logsumexp(1)
    return F.softplus(others - logits.gather(1, target.unsqueeze(1)).squeeze(1))


def _soft(logits: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        # A probability is rounded twice: through the logit, relative to the logit's size, and in the exponential.
        rounding = 16 * torch.finfo(logits.dtype).eps * p * (1 + logits.abs() + log_p.abs())
        own = ((p - target).abs() <= rounding.nan_to_num(0.0)).all(1, keepdim=True)
    return F.cross_entropy(torch.where(own, logits.detach(), logits), target, reduction="none")
