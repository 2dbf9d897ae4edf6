"""FreeMatch: FixMatch with thresholds that follow the model's confidence, and a fairness loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradconsist._inputs.options import check_count, check_number
from gradconsist._refusals.models import process_count
from gradconsist.errors import ConfigError
from gradconsist.methods.base import LogitsFunction
from gradconsist.methods.checks import check_classes
from gradconsist.methods.processes import gather
from gradconsist.methods.weak_to_strong import Logs, WeakToStrong
from gradconsist.types import SSLBatch


class FreeMatch(WeakToStrong):
    """Runs FixMatch with self-adaptive thresholds, and adds a self-adaptive fairness loss.

        p = softmax f(weak), without gradient;  target = argmax p;  q = softmax f(strong)
        tau <- d tau + (1 - d) mean max p;   p~ <- d p~ + (1 - d) mean p;   h~ <- d h~ + (1 - d) hist(target)
        T(c) = tau * p~(c) / max p~;   mask = 1[max p >= T(target)]
        L_u = 1/m sum mask * CE(target, f(strong))
        L_f = sum_c a(c) log(b(c) + 1e-12);   a = norm(p~ / h~);   b = norm(mean q / hist(argmax q)) where mask is 1
        L = CE(y, f(x)) + mu(t) * L_u + fairness_weight * L_f

    where hist gives the relative frequencies of classes, norm(v) = v / sum v, and dividing by a frequency of 0 gives 0.
    All three averages start at 1 / C and are updated *before* the mask is computed. L_f is the negative cross-entropy
    of a and b, so it is at most 0, and training *raises* that cross-entropy. If no sample passes the mask, L_f is 0.
    With several processes, mean q and its histogram cover all of them.

    Args:
        ema_decay: d.
        fairness_weight: weight of L_f.
        threshold_range: clamps T(c) to this range; the paper uses (0.9, 0.95) on SVHN. None does not clamp.

    Logs: threshold_mean, and loss_fairness unless its weight is 0, besides those of all methods.

    Attributes:
        confidence: tau.
        probability: p~ [C].
        histogram: h~ [C].

    Source: Wang et al., FreeMatch (2023), algorithm 1, and the authors' code in USB.
    `gradconsist.methods` describes the arguments, logs and errors that methods share.
    """

    confidence: Tensor
    probability: Tensor
    histogram: Tensor

    _shares = True

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        unlabeled_weight: float = 1.0,
        unlabeled_ramp_steps: int = 0,
        ema_decay: float = 0.999,
        fairness_weight: float = 0.001,
        threshold_range: tuple[float, float] | None = None,
        joint: bool = True,
        logits_fn: LogitsFunction | None = None,
    ) -> None:
        super().__init__(model, unlabeled_weight, unlabeled_ramp_steps, logits_fn, joint)
        self.classes = check_count("classes", classes)
        self.ema_decay = check_number("ema_decay", ema_decay, least=0.0, most=1.0)
        self.fairness_weight = check_number("fairness_weight", fairness_weight, least=0.0)
        if threshold_range is not None and not 0 <= threshold_range[0] <= threshold_range[1] <= 1:
            raise ConfigError(f"`threshold_range` is {threshold_range!r}: give (low, high) with 0 <= low <= high <= 1.")
        self.threshold_range = threshold_range
        self._remember("confidence", torch.tensor(1 / classes, dtype=torch.float64))
        self._remember("probability", torch.full((classes,), 1 / classes, dtype=torch.float64))
        self._remember("histogram", torch.full((classes,), 1 / classes, dtype=torch.float64))

    def thresholds(self) -> Tensor:
        """Returns T(c) for the current averages: [C]."""
        thresholds = self.confidence * self.probability / self.probability.max()
        return thresholds if self.threshold_range is None else thresholds.clamp(*self.threshold_range)

    def _targets(self, weak: Tensor, batch: SSLBatch) -> tuple[Tensor, Tensor, Logs]:
        check_classes(weak, self.classes)
        probability = weak.softmax(1)
        if self.training:
            self._update(gather(probability))
        confidence, target = probability.max(1)
        thresholds = self.thresholds()
        mask = (confidence >= thresholds[target]).to(weak.dtype)
        return target, mask, {"threshold_mean": thresholds.mean()}

    def _third_loss(self, strong: Tensor | None, weight: Tensor) -> tuple[Tensor, Logs] | None:
        if strong is None or self.fairness_weight == 0:
            return None
        fairness = self._fairness(strong.softmax(1)[weight > 0])
        return self.fairness_weight * fairness, {"loss_fairness": fairness.detach()}

    def sharing_obstacle(self) -> str | None:
        """See `WeakToStrong.sharing_obstacle`."""
        fair = "`fairness_weight` is not 0, and L_f needs the logits of the strong views"
        return fair if self.fairness_weight > 0 else super().sharing_obstacle()

    def _update(self, probability: Tensor) -> None:
        confidence, target = probability.max(1)
        # The argmax of a row that is not finite is still a valid label, so check the probabilities themselves.
        frequencies = _frequencies(target, self.histogram).where(probability.isfinite().all(), torch.nan)
        self.confidence = self._average(self.confidence, confidence.mean(), self.ema_decay)
        self.probability = self._average(self.probability, probability.mean(0), self.ema_decay)
        self.histogram = self._average(self.histogram, frequencies, self.ema_decay)

    def _fairness(self, q: Tensor) -> Tensor:
        """Computes L_f from the masked strong probabilities [k, C]."""
        everywhere = gather(q) if self.training else q.detach()
        if len(everywhere) == 0:
            return q.sum()  # zero, with a graph
        processes = process_count() if self.training else 1
        # The mean is over the samples of all processes, but this process differentiates only its own. Gradients are
        # averaged over the W processes afterwards, so its own samples count W times.
        own = q.sum(0)
        mean = (everywhere.sum(0) + processes * (own - own.detach())) / len(everywhere)
        a = _normalised(self.probability, self.histogram)
        b = _normalised(mean, _frequencies(everywhere.argmax(1), self.histogram))
        return (a.to(b.dtype) * (b + 1e-12).log()).sum()


def _frequencies(labels: Tensor, like: Tensor) -> Tensor:
    return torch.bincount(labels, minlength=len(like)).to(like.dtype) / len(labels)


def _normalised(value: Tensor, frequency: Tensor) -> Tensor:
    """Computes norm(value / frequency); a frequency of 0 gives 0."""
    known = frequency > 0
    quotient = torch.where(known, value / torch.where(known, frequency, 1).to(value.dtype), 0)
    return quotient / quotient.sum()
