"""Mean Teacher: the student agrees with an average of its own past."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from gradconsist._inputs.options import check_number
from gradconsist._inputs.schedules import sigmoid_ramp
from gradconsist.methods.base import LogitsFunction, Method
from gradconsist.methods.checks import check_batch
from gradconsist.types import SSLBatch, StepOutput, ViewPair


class MeanTeacher(Method):
    """Squared difference between the student's probabilities and those of an averaged teacher.

        theta' <- a theta' + (1 - a) theta;  a = min(1 - 1 / (t + 1), ema_decay)      (before step t = 0, 1, ...)
        target = softmax f(weak; theta'), without gradient;  q = softmax f(strong; theta)
        L_u = 1/(m C) sum ||q - target||^2;  L = CE(y, f(x)) + mu(t) * L_u

    mu(t) = unlabeled_weight * exp(-5 (1 - s)^2), s the share of the ramp that is over. The average is over parameters
    only: the teacher runs in train mode when the method does, on weak views alone, and keeps BatchNorm statistics of
    its own. It is updated at the beginning of a call, which is after the optimizer's last step; at t = 0 it becomes an
    exact copy, so weights that were loaded into the model after the method was made are the teacher's, too. Averages
    need parameters in float32: use autocast, not a model in 16 bits.

    With gradient accumulation over k batches there are k updates of the teacher, towards the same student, for one of
    the student: give `ema_decay` as a ** (1 / k), which averages over the same time as a without accumulation.

    The authors' code compares labeled inputs, too, and divides the classification loss by the whole batch; a batch has
    one view of labeled inputs, so L_u is over the unlabeled ones, and L_s a mean over the labeled ones. For the paper's
    setting `strong` is a second weak view.

    The pair is (teacher's input, student's input), both for the student; its target is the teacher's, its weight the
    share of unlabeled_weight that the ramp has reached.

    Args:
        model: the student, any module from inputs to logits [B, C] that can be copied.
        unlabeled_weight: mu after its ramp.
        unlabeled_ramp_steps: steps in train mode of the ramp; 0 is none. TorchSSL takes 40 % of the run.
        ema_decay: the largest a; its k-th root with gradient accumulation over k batches.
        logits_fn: from the model's output to logits [B, C], for models that return a tuple or something else.

    Attributes:
        step: calls in train mode so far.
        teacher: the averaged model, without gradients; often the better one to evaluate. It holds the student as it
            was at the last call. Both are part of ``state_dict()``.

    Raises:
        ConfigError: an option is out of range.

    Source: Tarvainen and Valpola, Mean teachers (2017), section 2.
    """

    _ramp = staticmethod(sigmoid_ramp)

    def __init__(
        self,
        model: nn.Module,
        *,
        unlabeled_weight: float = 50.0,
        unlabeled_ramp_steps: int = 0,
        ema_decay: float = 0.99,
        logits_fn: LogitsFunction | None = None,
    ) -> None:
        super().__init__(
            model,
            unlabeled_weight=unlabeled_weight,
            unlabeled_ramp_steps=unlabeled_ramp_steps,
            logits_fn=logits_fn,
        )
        check_number("ema_decay", ema_decay, least=0.0, most=1.0)
        self.ema_decay = ema_decay
        self.teacher = copy.deepcopy(model).requires_grad_(False)

    def forward(self, batch: SSLBatch) -> StepOutput:
        """The loss of one step.

        Args:
            batch: labeled inputs and labels; the teacher's (weak) and the student's (strong) unlabeled view.

        Returns:
            Loss, the pair (weak, strong, teacher's probabilities, ramp), and as logs loss_supervised, loss_unsupervised
            and unlabeled_weight.

        Raises:
            InputTypeError: `batch` is something else.
            InputShapeError: its parts differ in length where they must not, or are empty.
        """
        check_batch(batch)
        if self.training:
            self._update_teacher()
        target = self._without_graph(batch.weak, self.teacher).softmax(1)
        labeled, strong = self._joint_logits(batch.x, batch.strong)
        unsupervised = (strong.softmax(1) - target).square().mean()
        pair = ViewPair(batch.weak, batch.strong, target, target.new_full((len(target),), self.ramp()))
        return self._finish(F.cross_entropy(labeled, batch.y), unsupervised, pair)

    @torch.no_grad()
    def _update_teacher(self) -> None:
        decay = min(1 - 1 / (self.step + 1), self.ema_decay)
        for average, parameter in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            average.mul_(decay).add_(parameter, alpha=1 - decay)
        if self.step == 0:
            for own, buffer in zip(self.teacher.buffers(), self.model.buffers(), strict=True):
                own.copy_(buffer)
