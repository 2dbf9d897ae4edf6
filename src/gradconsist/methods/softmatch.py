"""SoftMatch: FixMatch that weights every pseudo-label by a Gaussian of its confidence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradconsist._inputs.options import check_choice, check_count, check_number
from gradconsist.methods.base import LogitsFunction
from gradconsist.methods.checks import check_classes
from gradconsist.methods.processes import gather
from gradconsist.methods.weak_to_strong import Logs, WeakToStrong
from gradconsist.types import SSLBatch


class SoftMatch(WeakToStrong):
    """Runs FixMatch with a soft weight per sample instead of a mask.

        p = softmax f(weak), without gradient;  target = argmax p
        p~ <- d p~ + (1 - d) mean p;   p' = norm(p * (1/C + 1e-6) / (p~ + 1e-6))        (uniform alignment)
        mean <- d mean + (1 - d) mean max p';   variance <- d variance + (1 - d) var max p'
        w = exp(-min(0, max p' - mean)^2 / (2 variance / width^2))
        L_u = 1/m sum w * CE(target, f(strong));   L = CE(y, f(x)) + mu(t) * L_u

    The alignment only affects the weight; the pseudo-label comes from p. All averages are updated before the weights
    are computed. The variance of a step is the unbiased one, so a step with one sample does not update it. mean starts
    at 1 / C, variance at 1, and p~ at the first step's mean, as in the authors' code.

    Args:
        ema_decay: d.
        width: n in the paper; a confidence one standard deviation below the mean has w = exp(-width^2 / 2).
        align: whether to align p'; False uses p itself.

    Logs: confidence_mean, besides those of all methods.

    Attributes:
        probability: p~ [C].
        mean: average of the confidences.
        variance: variance of the confidences.

    Source: Chen et al., SoftMatch (2023), and the authors' code in USB.
    `gradconsist.methods` describes the arguments, logs and errors that methods share.
    """

    probability: Tensor
    mean: Tensor
    variance: Tensor

    _shares = True

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        unlabeled_weight: float = 1.0,
        unlabeled_ramp_steps: int = 0,
        ema_decay: float = 0.999,
        width: float = 2.0,
        align: bool = True,
        joint: bool = True,
        logits_fn: LogitsFunction | None = None,
    ) -> None:
        super().__init__(model, unlabeled_weight, unlabeled_ramp_steps, logits_fn, joint)
        self.classes = check_count("classes", classes)
        self.ema_decay = check_number("ema_decay", ema_decay, least=0.0, most=1.0)
        self.width = check_number("width", width, least=0.0)
        self.align = check_choice("align", align, (True, False))
        self._remember("probability", torch.full((classes,), 1 / classes, dtype=torch.float64))
        self._remember("mean", torch.tensor(1 / classes, dtype=torch.float64))
        self._remember("variance", torch.tensor(1.0))

    def _targets(self, weak: Tensor, batch: SSLBatch) -> tuple[Tensor, Tensor, Logs]:
        check_classes(weak, self.classes)
        probability = weak.softmax(1)
        if self.training:
            self._update(gather(probability))
        below = (self._aligned(probability).amax(1) - self.mean).clamp(max=0.0)
        # A variance of 0 makes this a mask: w is 1 at the mean and above, and 0 below.
        variance = self.variance.clamp(min=torch.finfo(self.variance.dtype).tiny)
        weight = (-(self.width * below).square() / (2 * variance)).exp().to(weak.dtype)
        return probability.argmax(1), weight, {"confidence_mean": self.mean.clone()}

    def _update(self, probability: Tensor) -> None:
        decay = 0.0 if self.step == 0 else self.ema_decay
        self.probability = self._average(self.probability, probability.mean(0), decay)
        confidence = self._aligned(probability).amax(1)
        self.mean = self._average(self.mean, confidence.mean(), self.ema_decay)
        if len(confidence) > 1:
            self.variance = self._average(self.variance, confidence.var(), self.ema_decay)

    def _aligned(self, probability: Tensor) -> Tensor:
        if not self.align:
            return probability
        aligned = probability * (1 / self.classes + 1e-6) / (self.probability.to(probability.dtype) + 1e-6)
        return aligned / aligned.sum(1, keepdim=True)
