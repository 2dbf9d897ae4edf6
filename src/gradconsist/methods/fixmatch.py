"""FixMatch: takes pseudo-labels from weak views and trains the strong views on them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist._inputs.options import check_number
from gradconsist.methods.base import LogitsFunction
from gradconsist.methods.weak_to_strong import Logs, WeakToStrong
from gradconsist.types import SSLBatch


class FixMatch(WeakToStrong):
    """Trains strong views on hard pseudo-labels that come from confident predictions on weak views.

        L = L_s + mu(t) * L_u
        L_s = 1/B_l sum CE(y, f(x)) + brier_weight * 1/B_l sum ||softmax f(x) - onehot(y)||^2
        p = softmax f(weak), without gradient;  target = argmax p;  mask = 1[max p >= threshold]
        L_u = 1/B_u sum mask * CE(target, f(strong))

    L_u is a mean over all B_u unlabeled images, masked or not. Probabilities and losses are computed in float32 or
    wider: near 0.95, bfloat16 has steps of 0.004, so the mask would flip.

    Args:
        threshold: a pseudo-label counts if its confidence is at least this.
        brier_weight: weight of the squared error of the labeled probabilities.

    Source: Sohn et al., FixMatch (2020), algorithm 1 and eq. (3) and (4).
    `gradconsist.methods` describes the arguments, logs and errors that methods share.
    """

    _shares = True

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = 0.95,
        unlabeled_weight: float = 1.0,
        unlabeled_ramp_steps: int = 0,
        brier_weight: float = 0.0,
        joint: bool = True,
        logits_fn: LogitsFunction | None = None,
    ) -> None:
        super().__init__(model, unlabeled_weight, unlabeled_ramp_steps, logits_fn, joint)
        self.threshold = check_number("threshold", threshold, least=0.0, most=1.0)
        self.brier_weight = check_number("brier_weight", brier_weight, least=0.0)

    def _targets(self, weak: Tensor, batch: SSLBatch) -> tuple[Tensor, Tensor, Logs]:
        confidence, target = weak.softmax(1).max(1)
        return target, (confidence >= self.threshold).to(weak.dtype), {}

    def _supervised(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Logs]:
        loss = F.cross_entropy(logits, y)
        if self.brier_weight > 0:
            onehot = F.one_hot(y, logits.shape[1])
            loss = loss + self.brier_weight * (logits.softmax(1) - onehot).square().sum(1).mean()
        return loss, {}
