"""Pseudo-Label: trains one view on its own confident predictions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from gradconsist._inputs.options import check_number
from gradconsist.methods.base import LogitsFunction, Method
from gradconsist.types import SSLBatch, StepOutput


class PseudoLabel(Method):
    """Trains the model on its own confident predictions, with a single view (self-training).

        z = f(weak);  p = softmax z, as a constant;  target = argmax p;  mask = 1[max p >= threshold]
        L_u = 1/m sum mask * CE(target, z);  L = CE(y, f(x)) + mu(t) * L_u

    Target and prediction come from the same logits of one view, in one forward of labeled and weak inputs together. The
    method does not use `strong`; it only passes it on in the pair, for gradient consistency, with target and mask.
    Labels are renewed in every step, while self-training in rounds would keep them for an epoch or longer. The paper
    uses every pseudo-label (threshold 0) and lets mu grow; the threshold came later, with TorchSSL and USB.

    Args:
        threshold: a pseudo-label counts if its confidence is at least this.

    Source: Lee, Pseudo-Label (2013); TorchSSL's code.
    `gradconsist.methods` describes the arguments, logs and errors that methods share.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = 0.95,
        unlabeled_weight: float = 1.0,
        unlabeled_ramp_steps: int = 0,
        logits_fn: LogitsFunction | None = None,
    ) -> None:
        super().__init__(model, unlabeled_weight, unlabeled_ramp_steps, logits_fn)
        self.threshold = check_number("threshold", threshold, least=0.0, most=1.0)

    def forward(self, batch: SSLBatch) -> StepOutput:
        """Computes the loss of one step."""
        labeled, weak = self._joint_logits(batch.x, batch.weak)
        confidence, target = weak.detach().softmax(1).max(1)
        mask = (confidence >= self.threshold).to(weak.dtype)
        supervised = F.cross_entropy(labeled, batch.y)
        unsupervised = (mask * F.cross_entropy(weak, target, reduction="none")).mean()
        return self._finish(batch, supervised, unsupervised, target, mask, mask_rate=mask.mean())
