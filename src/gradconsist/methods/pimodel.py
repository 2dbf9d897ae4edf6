"""The Pi-model: two stochastic passes over one sample agree."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from gradconsist._inputs.options import check_choice
from gradconsist._inputs.schedules import sigmoid_ramp
from gradconsist.methods.base import LogitsFunction, Method
from gradconsist.methods.checks import check_batch
from gradconsist.types import SSLBatch, StepOutput, ViewPair


class PiModel(Method):
    """Squared difference of the probabilities of two views, with gradients through both.

        p1 = softmax f(weak);  p2 = softmax f(strong)
        L_u = 1/(m C) sum ||p1 - p2||^2;  L = CE(y, f(x)) + mu(t) * L_u

    mu(t) = unlabeled_weight * exp(-5 (1 - t)^2), t the share of the ramp that is over. Google's reimplementation and
    USB's hold p1 constant; the paper does not, and neither do we. The paper compares labeled inputs with themselves,
    too; a batch has one view of those, so L_u is over the unlabeled ones, of which the labeled are usually a part. For
    the paper's setting `strong` is a second weak view.

    The pair's target is the class that both passes together find most likely, argmax (p1 + p2). Their mean itself would
    make the residuals p1 - p2 and p2 - p1 exactly opposite, so that close views had cosine -1 and the term drove them
    apart; p1 alone would make the weak view's gradient zero. The weight is the share of unlabeled_weight that the ramp
    has reached.

    Args:
        model: any module from inputs to logits [B, C].
        unlabeled_weight: mu after its ramp.
        unlabeled_ramp_steps: steps in train mode of the ramp; 0 is none. TorchSSL takes 40 % of the run.
        joint: True forwards labeled, weak and strong inputs as one batch; False labeled and weak inputs in one forward
            and the strong ones in another, with BatchNorm statistics of their own, as the paper's two passes have.
        logits_fn: from the model's output to logits [B, C], for models that return a tuple or something else.

    Attributes:
        step: calls in train mode so far; part of ``state_dict()``.

    Raises:
        ConfigError: an option is out of range.

    Source: Laine and Aila, Temporal Ensembling (2017), algorithm 1.
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
        super().__init__(
            model,
            unlabeled_weight=unlabeled_weight,
            unlabeled_ramp_steps=unlabeled_ramp_steps,
            logits_fn=logits_fn,
        )
        check_choice("joint", joint, (True, False))
        self.joint = joint

    def forward(self, batch: SSLBatch) -> StepOutput:
        """The loss of one step.

        Args:
            batch: labeled inputs and labels, and two views of the unlabeled ones.

        Returns:
            Loss, the pair (weak, strong, common class, ramp), and as logs loss_supervised, loss_unsupervised and
            unlabeled_weight.

        Raises:
            InputTypeError: `batch` is something else.
            InputShapeError: its parts differ in length where they must not, or are empty.
        """
        check_batch(batch)
        if self.joint:
            labeled, *views = self._joint_logits(batch.x, batch.weak, batch.strong)
        else:
            labeled, first = self._joint_logits(batch.x, batch.weak)
            views = [first, *self._joint_logits(batch.strong)]
        one, two = (view.softmax(1) for view in views)
        target = (one + two).detach().argmax(1)
        pair = ViewPair(batch.weak, batch.strong, target, one.new_full((len(one),), self.ramp()))
        return self._finish(F.cross_entropy(labeled, batch.y), (one - two).square().mean(), pair)
