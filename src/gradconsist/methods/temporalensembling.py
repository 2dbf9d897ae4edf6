"""Temporal Ensembling: trains each prediction to agree with the average of the sample's earlier ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist._inputs.options import check_count, check_number
from gradconsist._inputs.schedules import sigmoid_ramp
from gradconsist.methods.base import LogitsFunction, Method
from gradconsist.methods.checks import check_classes, check_index
from gradconsist.methods.processes import gather
from gradconsist.types import SSLBatch, StepOutput


class TemporalEnsembling(Method):
    """Penalises the squared difference between a sample's prediction and the average of its earlier ones.

        z = softmax f(weak);  target = Z[i] / (1 - a^v[i]), v[i] = number of earlier visits of sample i
        L_u = 1/(m C) sum 1[v[i] > 0] ||z - target||^2;  L = CE(y, f(x)) + mu(t) * L_u
        afterwards  Z[i] <- a Z[i] + (1 - a) z;  v[i] <- v[i] + 1

    mu(t) = unlabeled_weight * exp(-5 (1 - s)^2), where s is the finished share of the ramp.

    The paper updates all of Z at the end of an epoch. If each sample comes once per epoch, updating row by row is the
    same, because a row of Z is read only when its sample comes again. It also needs no epochs, so it works for loaders
    that drop the last samples or mix the end of one epoch with the start of the next. A first visit has weight 0, like
    the paper's first epoch, whose targets are 0. If a batch (or several processes together) holds a sample more than
    once, that counts as one visit with the mean of its z; a z that is not finite counts as none.

    Labeled and weak inputs share one forward. The method does not use `strong`; it only passes it on in the pair, for
    gradient consistency. The pair's target is the ensemble's prediction. Its weight is the share of unlabeled_weight
    that the ramp has reached, or 0 on a first visit (where the target is uniform, so that it is a distribution). The
    paper also compares labeled inputs; here L_u is a mean over the unlabeled inputs, which usually include them.

    Args:
        unlabeled_weight: mu after its ramp. Multiply the paper's 30 by the share of labeled samples in your data.
        ema_decay: a.

    Logs: mask_rate is the share of samples that have been seen before.

    Attributes:
        ensemble: Z [N, C].
        visits: v [N], int64.

    Source: Laine and Aila, Temporal Ensembling (2017), algorithm 2.
    `gradconsist.methods` describes the arguments, logs and errors that methods share.
    """

    ensemble: Tensor
    visits: Tensor
    _ramp = staticmethod(sigmoid_ramp)

    def __init__(
        self,
        model: nn.Module,
        *,
        samples: int,
        classes: int,
        unlabeled_weight: float = 30.0,
        unlabeled_ramp_steps: int = 0,
        ema_decay: float = 0.6,
        logits_fn: LogitsFunction | None = None,
    ) -> None:
        super().__init__(model, unlabeled_weight, unlabeled_ramp_steps, logits_fn)
        self.samples = check_count("samples", samples)
        self.classes = check_count("classes", classes)
        self.ema_decay = check_number("ema_decay", ema_decay, least=0.0, most=0.9999)
        self._remember("ensemble", torch.zeros(samples, classes))
        self._remember("visits", torch.zeros(samples, dtype=torch.int64))

    def forward(self, batch: SSLBatch) -> StepOutput:
        """Computes the loss of one step."""
        index = check_index(batch, self.samples)
        labeled, weak = self._joint_logits(batch.x, batch.weak)
        check_classes(weak, self.classes)
        z = weak.softmax(1)
        visits = self.visits[index]
        known = (visits > 0).to(z.dtype)
        target = self._targets(index, visits).to(z.dtype)
        unsupervised = (known[:, None] * (z - target).square()).mean()
        if self.training:
            self._visit(gather(index), gather(z))
        supervised, weight = F.cross_entropy(labeled, batch.y), known * self.ramp()
        return self._finish(batch, supervised, unsupervised, target, weight, mask_rate=known.mean())

    def _targets(self, index: Tensor, visits: Tensor) -> Tensor:
        """Computes Z / (1 - a^v) of the samples; uniform where v is 0."""
        correction = 1 - self.ema_decay ** visits.clamp(min=1).to(self.ensemble.dtype)
        return torch.where(visits[:, None] > 0, self.ensemble[index] / correction[:, None], 1 / self.classes)

    def _visit(self, index: Tensor, z: Tensor) -> None:
        finite = z.isfinite().all(1)
        index, z = index[finite], z[finite]
        rows, place, times = torch.unique(index, return_inverse=True, return_counts=True)
        sums = self.ensemble.new_zeros(len(rows), self.classes).index_add(0, place, z.to(self.ensemble.dtype))
        self.ensemble[rows] = self.ema_decay * self.ensemble[rows] + (1 - self.ema_decay) * sums / times[:, None]
        self.visits[rows] += 1
