"""The Pi-model: trains two stochastic passes over the same sample to agree."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from gradconsist._inputs.schedules import sigmoid_ramp
from gradconsist.methods.base import LogitsFunction, Method
from gradconsist.types import SSLBatch, StepOutput


class PiModel(Method):
    """Penalises the squared difference of the probabilities of two views, with gradients through both.

        p1 = softmax f(weak);  p2 = softmax f(strong)
        L_u = 1/(m C) sum ||p1 - p2||^2;  L = CE(y, f(x)) + mu(t) * L_u

    mu(t) = unlabeled_weight * exp(-5 (1 - t)^2), where t is the finished share of the ramp. Google's reimplementation
    and USB's hold p1 constant; the paper does not, nor does this class. The paper also compares labeled inputs with
    themselves. A batch here has only one view of those, so L_u is a mean over the unlabeled inputs, which usually
    include the labeled ones. For the paper's setting, pass a second weak view as `strong`.

    The pair's target is the class that both passes together find most likely, argmax (p1 + p2). With the mean of p1 and
    p2 as target, the residuals p1 - p2 and p2 - p1 would be exactly opposite: the cosine of close views would be -1,
    and the term would drive them apart. With p1 alone, the weak view's gradient would be zero. The pair's weight is the
    share of unlabeled_weight that the ramp has reached.

    Args:
        joint: True forwards labeled, weak and strong inputs as one batch. False forwards labeled and weak inputs
            together and the strong ones separately, each with its own BatchNorm statistics, like the paper's two
            passes.

    Source: Laine and Aila, Temporal Ensembling (2017), algorithm 1.
    `gradconsist.methods` describes the arguments, logs and errors that methods share.
    """

    _ramp = staticmethod(sigmoid_ramp)

    def __init__(
        self,
        model: nn.Module,
        *,
        unlabeled_weight: float = 10.0,
        unlabeled_ramp_steps: int = 0,
        joint: bool = True,
        logits_fn: LogitsFunction | None = None,
    ) -> None:
        super().__init__(model, unlabeled_weight, unlabeled_ramp_steps, logits_fn, joint)

    def forward(self, batch: SSLBatch) -> StepOutput:
        """Computes the loss of one step."""
        if self.joint:
            labeled, *views = self._joint_logits(batch.x, batch.weak, batch.strong)
        else:
            labeled, first = self._joint_logits(batch.x, batch.weak)
            views = [first, *self._joint_logits(batch.strong)]
        one, two = (view.softmax(1) for view in views)
        target = (one + two).detach().argmax(1)
        weight = one.new_full((len(one),), self.ramp())
        return self._finish(batch, F.cross_entropy(labeled, batch.y), (one - two).square().mean(), target, weight)
