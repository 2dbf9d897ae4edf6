"""Mean Teacher: trains a student to agree with a teacher whose weights are the student's moving average."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from gradconsist._inputs.options import check_number
from gradconsist._inputs.schedules import sigmoid_ramp
from gradconsist.methods.base import LogitsFunction, Method
from gradconsist.types import SSLBatch, StepOutput


class MeanTeacher(Method):
    """Penalises the squared difference between the probabilities of the student and of an averaged teacher.

        theta' <- a theta' + (1 - a) theta;  a = min(1 - 1 / (t + 1), ema_decay)      (before step t = 0, 1, ...)
        target = softmax f(weak; theta'), without gradient;  q = softmax f(strong; theta)
        L_u = 1/(m C) sum ||q - target||^2;  L = CE(y, f(x)) + mu(t) * L_u

    mu(t) = unlabeled_weight * exp(-5 (1 - s)^2), where s is the finished share of the ramp. Only parameters are
    averaged: the teacher runs in train mode when the method does, sees weak views only, and keeps separate BatchNorm
    statistics. It is updated at the start of a call, that is, after the last optimizer step. At t = 0 it becomes an
    exact copy of the student, so weights that you load into the model after creating the method reach the teacher, too.
    Averages need float32 parameters: use autocast, not a 16-bit model.

    The authors' code also compares labeled inputs, and divides the classification loss by the whole batch. A batch here
    has only one view of labeled inputs, so L_u is a mean over the unlabeled inputs and L_s over the labeled ones. For
    the paper's setting, pass a second weak view as `strong`.

    The pair is (teacher's input, student's input), and both views are compared on the student. Its target is the
    teacher's output; its weight is the share of unlabeled_weight that the ramp has reached.

    Args:
        model: the student, which must allow a deep copy.
        ema_decay: the largest a. With gradient accumulation over k batches, the teacher is updated k times for one
            update of the student: pass the k-th root to average over the same time.

    Attributes:
        teacher: the averaged model, without gradients; often the better one to evaluate. Its average includes the
            student up to the last call.

    Source: Tarvainen and Valpola, Mean teachers (2017), section 2.
    `gradconsist.methods` describes the arguments, logs and errors that methods share.
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
        super().__init__(model, unlabeled_weight, unlabeled_ramp_steps, logits_fn)
        self.ema_decay = check_number("ema_decay", ema_decay, least=0.0, most=1.0)
        self.teacher = copy.deepcopy(model).requires_grad_(False)

    def forward(self, batch: SSLBatch) -> StepOutput:
        """Computes the loss of one step."""
        if self.training:
            self._update_teacher()
        target = self._without_graph(batch.weak, self.teacher).softmax(1)
        labeled, strong = self._joint_logits(batch.x, batch.strong)
        unsupervised = (strong.softmax(1) - target).square().mean()
        weight = target.new_full((len(target),), self.ramp())
        return self._finish(batch, F.cross_entropy(labeled, batch.y), unsupervised, target, weight)

    @torch.no_grad()
    def _update_teacher(self) -> None:
        decay = min(1 - 1 / (self.step + 1), self.ema_decay)
        for average, parameter in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            average.mul_(decay).add_(parameter, alpha=1 - decay)
        if self.step == 0:
            for own, buffer in zip(self.teacher.buffers(), self.model.buffers(), strict=True):
                own.copy_(buffer)
