"""UDA: trains strong views on sharpened soft pseudo-labels from weak views."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradconsist._inputs.options import check_choice, check_count, check_number
from gradconsist._refusals.models import process_count
from gradconsist.errors import ConfigError
from gradconsist.methods.base import LogitsFunction
from gradconsist.methods.processes import gather
from gradconsist.methods.weak_to_strong import Logs, WeakToStrong
from gradconsist.types import SSLBatch

Annealing = Literal["linear", "log", "exp"]


class UDA(WeakToStrong):
    """Trains strong views on soft, sharpened pseudo-labels from weak views.

        L = L_s + mu(t) * L_u
        p = softmax f(weak), without gradient;  mask = 1[max p >= threshold]
        target = softmax(f(weak) / temperature)
        L_u = 1/m sum mask * KL(target || softmax f(strong))
        L_s = sum keep * CE(y, f(x)) / max(1, sum keep);  keep = 1[p(y) <= eta(t)] with `annealing`, else 1

    The mask uses p before sharpening. While few unlabeled samples have been seen, training signal annealing (TSA)
    leaves out labeled samples that the model already knows too well:
    eta(t) = a(t) (1 - 1/C) + 1/C with a = t / T ("linear"), 1 - exp(-5 t / T) ("log") or exp(5 (t / T - 1)) ("exp").
    From t = T on, nothing is left out. L_s divides by the number of samples kept, as the authors' code does (USB's
    divides by all); with several processes, by the number kept in all of them.

    Args:
        threshold: an unlabeled sample counts if its confidence is at least this.
        temperature: temperature of the sharpening; 1 does not change p.
        annealing: schedule of TSA; None switches TSA off.
        annealing_steps: T; only with `annealing`.

    Logs: labeled_rate, the share of labeled samples that TSA kept, besides those of all methods.

    Raises:
        ConfigError: only one of `annealing` and `annealing_steps` is given.

    Source: Xie et al., Unsupervised Data Augmentation (2020), and the authors' code.
    `gradconsist.methods` describes the arguments, logs and errors that methods share.
    """

    _shares = True

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = 0.8,
        temperature: float = 0.4,
        unlabeled_weight: float = 1.0,
        unlabeled_ramp_steps: int = 0,
        annealing: Annealing | None = None,
        annealing_steps: int = 0,
        joint: bool = True,
        logits_fn: LogitsFunction | None = None,
    ) -> None:
        super().__init__(model, unlabeled_weight, unlabeled_ramp_steps, logits_fn, joint)
        self.threshold = check_number("threshold", threshold, least=0.0, most=1.0)
        self.temperature = check_number("temperature", temperature, least=1e-3)
        self.annealing = check_choice("annealing", annealing, (None, "linear", "log", "exp"))
        self.annealing_steps = check_count("annealing_steps", annealing_steps, least=0)
        if (annealing is None) != (annealing_steps == 0):
            raise ConfigError(
                f"`annealing` is {annealing!r} and `annealing_steps` {annealing_steps}: give both, or neither."
            )

    def _targets(self, weak: Tensor, batch: SSLBatch) -> tuple[Tensor, Tensor, Logs]:
        mask = (weak.softmax(1).amax(1) >= self.threshold).to(weak.dtype)
        return (weak / self.temperature).softmax(1), mask, {}

    def _supervised(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Logs]:
        losses = F.cross_entropy(logits, y, reduction="none")
        if self.annealing is None or self.step >= self.annealing_steps:
            return losses.mean(), {"labeled_rate": torch.ones((), device=losses.device)}
        share = self.step / self.annealing_steps
        signal = {"linear": share, "log": 1 - math.exp(-5 * share), "exp": math.exp(5 * (share - 1))}[self.annealing]
        eta = signal * (1 - 1 / logits.shape[1]) + 1 / logits.shape[1]
        keep = ((-losses.detach()).exp() <= eta).to(losses.dtype)
        # The mean of the processes' losses must be the sum over all of them, divided by the number that all kept.
        count = gather(keep).sum() if self.training else keep.sum()
        processes = process_count() if self.training else 1
        return processes * (keep * losses).sum() / count.clamp(min=1), {"labeled_rate": keep.mean()}
