"""FixMatch: pseudo-labels from weak views, consistency on strong ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist.errors import InputShapeError, InputTypeError
from gradconsist.schedules import linear_ramp
from gradconsist.types import SSLBatch, StepOutput, ViewPair
from gradconsist.validation import check_choice, check_count, check_number


class FixMatch(nn.Module):
    """L = L_s + mu(t) * L_u, with one hard pseudo-label per unlabeled image.

        L_s = 1/B_l sum CE(y, f(x)) + brier_weight * 1/B_l sum ||softmax f(x) - onehot(y)||^2
        p = softmax f(weak), without gradient;  target = argmax p;  mask = 1[max p >= threshold]
        L_u = 1/B_u sum mask * CE(target, f(strong))

    The mean runs over all B_u unlabeled images, masked or not. Probabilities and losses are in float32 at least: in
    bfloat16 the steps near 0.95 are 0.004 wide and the mask would flip.

    Args:
        model: any module from inputs to logits [B, C].
        threshold: confidence from which on a pseudo-label counts.
        unlabeled_weight: mu.
        unlabeled_ramp_steps: steps of this method in train mode over which mu grows linearly from 0; 0 is none.
        brier_weight: weight of the squared error of the labeled probabilities.
        joint: True forwards labeled, weak and strong inputs as one batch, so that BatchNorm sees all of them, as the
            reference code does; False forwards labeled and strong inputs together and the weak ones on their own
            without a graph, which is cheaper.

    Attributes:
        step: calls in train mode so far; part of ``state_dict()``.

    Raises:
        ConfigError: an option is out of range.

    Source: Sohn et al., FixMatch (2020), algorithm 1 and eq. (3) and (4).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = 0.95,
        unlabeled_weight: float = 1.0,
        unlabeled_ramp_steps: int = 0,
        brier_weight: float = 0.0,
        joint: bool = True,
    ) -> None:
        super().__init__()
        check_number("threshold", threshold, least=0.0, most=1.0)
        check_number("unlabeled_weight", unlabeled_weight, least=0.0)
        check_count("unlabeled_ramp_steps", unlabeled_ramp_steps, least=0)
        check_number("brier_weight", brier_weight, least=0.0)
        check_choice("joint", joint, (True, False))
        self.model = model
        self.threshold = threshold
        self.unlabeled_weight = unlabeled_weight
        self.unlabeled_ramp_steps = unlabeled_ramp_steps
        self.brier_weight = brier_weight
        self.joint = joint
        self.step = 0

    def forward(self, batch: SSLBatch) -> StepOutput:
        """The loss of one step.

        Args:
            batch: labeled inputs and labels, weak and strong views.

        Returns:
            Loss, the pair (weak, strong, pseudo-labels, mask), and as logs loss_supervised, loss_unsupervised,
            mask_rate and unlabeled_weight.

        Raises:
            InputTypeError: `batch` is something else.
            InputShapeError: its parts differ in length where they must not.
        """
        if not isinstance(batch, SSLBatch):
            raise InputTypeError(f"`batch` is a {type(batch).__name__}: pass SSLBatch(x, y, weak, strong).")
        if len(batch.x) != len(batch.y) or len(batch.weak) != len(batch.strong):
            raise InputShapeError(
                f"`batch` has {len(batch.x)} labeled inputs x, {len(batch.y)} labels y, {len(batch.weak)} weak and"
                f" {len(batch.strong)} strong views: x and y, weak and strong belong together row by row."
            )
        labeled, weak, strong = self._logits(batch)
        confidence, target = weak.softmax(1).max(1)
        mask = (confidence >= self.threshold).to(strong.dtype)
        supervised = F.cross_entropy(labeled, batch.y)
        if self.brier_weight > 0:
            onehot = F.one_hot(batch.y, labeled.shape[1])
            supervised = supervised + self.brier_weight * (labeled.softmax(1) - onehot).square().sum(1).mean()
        unsupervised = (mask * F.cross_entropy(strong, target, reduction="none")).mean()
        mu = self.unlabeled_weight * linear_ramp(self.step, self.unlabeled_ramp_steps)
        if self.training:
            self.step += 1
        logs: dict[str, float | Tensor] = {
            "loss_supervised": supervised.detach(),
            "loss_unsupervised": unsupervised.detach(),
            "mask_rate": mask.mean(),
            "unlabeled_weight": mu,
        }
        return StepOutput(supervised + mu * unsupervised, ViewPair(batch.weak, batch.strong, target, mask), logs)

    def _logits(self, batch: SSLBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of labeled, weak (without graph) and strong inputs, in float32 at least."""
        n, m = batch.x.shape[0], batch.weak.shape[0]
        if self.joint:
            labeled, weak, strong = _wide(self.model(torch.cat([batch.x, batch.weak, batch.strong]))).split([n, m, m])
            return labeled, weak.detach(), strong
        with torch.no_grad():
            weak = _wide(self.model(batch.weak))
        labeled, strong = _wide(self.model(torch.cat([batch.x, batch.strong]))).split([n, m])
        return labeled, weak, strong

    def get_extra_state(self) -> dict[str, int]:
        """The step counter, as part of ``state_dict()``."""
        return {"step": self.step}

    def set_extra_state(self, state: Any) -> None:
        """Restores the step counter; called by ``load_state_dict``."""
        self.step = int(state["step"])


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
