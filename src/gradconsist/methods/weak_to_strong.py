"""What FixMatch and its relatives share: pseudo-labels from weak views, on which the strong views are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from gradconsist.methods.base import Method
from gradconsist.types import SSLBatch, StepOutput, UnlabeledLoss

Logs = dict[str, Tensor]


class WeakToStrong(Method):
    """Trains strong views on targets that come from weak views, each with a weight.

        L = L_s + mu(t) * L_u;   L_u = 1/m sum weight * KL(target || softmax f(strong))

    For a target that is a class, the divergence is the cross-entropy. The arguments are those of `FixMatch`.
    """

    # Whether all of the step is known: a subclass may compute another unlabeled loss, so each class says so itself.
    _shares: ClassVar[bool] = False
    _elsewhere: UnlabeledLoss | None = None  # set while the caller computes the unlabeled loss

    def forward(self, batch: SSLBatch) -> StepOutput:
        """Computes the loss of one step."""
        labeled, weak, strong = self._view_logits(batch)
        target, weight, logs = self._targets(weak, batch)
        supervised, labeled_logs = self._supervised(labeled, batch.y)
        unsupervised = self._unlabeled_loss(strong, target, weight)
        third = self._third_loss(strong, weight)
        logs = {"mask_rate": weight.mean(), **logs, **labeled_logs, **(third[1] if third else {})}
        out = self._finish(batch, supervised, unsupervised, target, weight, **logs)
        return out._replace(loss=out.loss + third[0]) if third else out

    def _targets(self, weak: Tensor, batch: SSLBatch) -> tuple[Tensor, Tensor, Logs]:
        """Returns targets, their weights [m] in the dtype of `weak`, and logs, from the weak views' logits [m, C]."""
        raise NotImplementedError

    def _supervised(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Logs]:
        """Computes L_s, and logs."""
        return F.cross_entropy(logits, y), {}

    def _third_loss(self, strong: Tensor | None, weight: Tensor) -> tuple[Tensor, Logs] | None:
        """Computes a loss beside L_s and mu(t) * L_u, its factor included, and logs."""
        return None

    def sharing_obstacle(self) -> str | None:
        """Says why the unlabeled loss cannot be computed by somebody else; None if it can."""
        if not vars(type(self)).get("_shares", False):
            name = type(self).__name__
            return f"the unlabeled loss of {name} is not known to be a mean of the strong views' cross-entropies"
        return None if self.logits_fn is None else "the method has a `logits_fn`, which the comparison does not use"

    @contextmanager
    def unlabeled_elsewhere(self, *, together: bool) -> Iterator[UnlabeledLoss]:
        """Leaves the unlabeled loss of the step in the block to the caller: the strong views are not forwarded.

        The step fills in the loss that this yields. `together` says whether a method with ``joint=True`` forwards
        labeled and weak inputs as one batch.
        """
        self._elsewhere = UnlabeledLoss(together)
        try:
            yield self._elsewhere
        finally:
            del self._elsewhere

    def _view_logits(self, batch: SSLBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Computes the logits of labeled [n, C], weak (without graph) and strong inputs [m, C], in float32 or wider.

        Those of the strong inputs are None if the unlabeled loss is computed elsewhere.
        """
        if self._elsewhere is not None:
            if self.joint and self._elsewhere.together:
                labeled, weak = self._joint_logits(batch.x, batch.weak)
                return labeled, weak.detach(), None
            return self._joint_logits(batch.x)[0], self._without_graph(batch.weak), None
        if self.joint:
            labeled, weak, strong = self._joint_logits(batch.x, batch.weak, batch.strong)
            return labeled, weak.detach(), strong
        weak = self._without_graph(batch.weak)
        labeled, strong = self._joint_logits(batch.x, batch.strong)
        return labeled, weak, strong

    def _unlabeled_loss(self, strong: Tensor | None, target: Tensor, weight: Tensor) -> Tensor:
        """Computes L_u from logits [m, C]; None leaves the loss to the caller, and 0 is returned."""
        soft = target.is_floating_point()
        if strong is not None:
            if soft:
                return (weight * F.kl_div(strong.log_softmax(1), target, reduction="none").sum(1)).mean()
            return (weight * F.cross_entropy(strong, target, reduction="none")).mean()
        if self._elsewhere is not None:
            constant = (weight * target.xlogy(target).sum(1)).mean() if soft else 0.0
            self._elsewhere.weight, self._elsewhere.constant, self._elsewhere.factor = weight, constant, self._mu()
        return weight.new_zeros(())
