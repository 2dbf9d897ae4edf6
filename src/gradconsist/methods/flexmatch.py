"""FlexMatch: FixMatch with a lower threshold for classes that the model has not learned well yet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradconsist._inputs.options import check_choice, check_count, check_number
from gradconsist.methods.base import LogitsFunction
from gradconsist.methods.checks import check_index
from gradconsist.methods.processes import gather, last_rows
from gradconsist.methods.weak_to_strong import Logs, WeakToStrong
from gradconsist.types import SSLBatch, StepOutput


class FlexMatch(WeakToStrong):
    """Runs FixMatch with one threshold per class, lower for classes with few confident pseudo-labels so far.

        selected[i] = the label of sample i when its max p was last >= threshold; -1 before
        sigma(c) = number of samples with selected[i] = c
        beta(c) = sigma(c) / max(max sigma, N - sum sigma)             (without the warm-up: sigma(c) / max sigma)
        T(c) = threshold * beta(c) / (2 - beta(c))
        p = softmax f(weak), without gradient;  target = argmax p;  mask = 1[max p >= T(target)]
        L_u = 1/m sum mask * CE(target, f(strong));  L = CE(y, f(x)) + mu(t) * L_u

    `selected` is updated after the mask is computed, with the fixed threshold, not T. At the start, every beta is 0, so
    every threshold is 0 and every pseudo-label counts. The paper wants it so; `unlabeled_ramp_steps` can soften it.

    There is one deviation from the reference code: it does not update beta while all N entries of `selected` are equal;
    here the formula always holds.

    Args:
        threshold: a sample is selected if its confidence is at least this; also the largest T(c).
        threshold_warmup: whether samples without a selected label count in beta's denominator.

    Logs: threshold_mean, besides those of all methods.

    Attributes:
        selected: see above, [N] int64.

    Source: Zhang et al., FlexMatch (2021), algorithm 1, and the authors' code in TorchSSL.
    `gradconsist.methods` describes the arguments, logs and errors that methods share.
    """

    selected: Tensor

    _shares = True

    def __init__(
        self,
        model: nn.Module,
        *,
        samples: int,
        threshold: float = 0.95,
        unlabeled_weight: float = 1.0,
        unlabeled_ramp_steps: int = 0,
        threshold_warmup: bool = True,
        joint: bool = True,
        logits_fn: LogitsFunction | None = None,
    ) -> None:
        super().__init__(model, unlabeled_weight, unlabeled_ramp_steps, logits_fn, joint)
        self.samples = check_count("samples", samples)
        self.threshold = check_number("threshold", threshold, least=0.0, most=1.0)
        self.threshold_warmup = check_choice("threshold_warmup", threshold_warmup, (True, False))
        self._remember("selected", torch.full((samples,), -1))

    def thresholds(self, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns T(c) [classes] for the next step, in `dtype`."""
        sigma = torch.bincount(self.selected[self.selected >= 0], minlength=classes).to(dtype)
        largest = sigma.max()
        if self.threshold_warmup:
            largest = torch.maximum(largest, self.samples - sigma.sum())
        beta = sigma / largest.clamp(min=1.0)  # largest is 0 only where sigma is
        return self.threshold * beta / (2 - beta)

    def forward(self, batch: SSLBatch) -> StepOutput:
        """Computes the loss of one step."""
        return super().forward(batch._replace(index=check_index(batch, self.samples)))

    def _targets(self, weak: Tensor, batch: SSLBatch) -> tuple[Tensor, Tensor, Logs]:
        confidence, target = weak.softmax(1).max(1)
        thresholds = self.thresholds(weak.shape[1], weak.dtype)
        mask = (confidence >= thresholds[target]).to(weak.dtype)
        if self.training and batch.index is not None:
            index, label = gather(batch.index), gather(torch.where(confidence >= self.threshold, target, -1))
            entries, rows = last_rows(index[label >= 0])
            self.selected[entries] = label[label >= 0][rows]
        return target, mask, {"threshold_mean": thresholds.mean()}
