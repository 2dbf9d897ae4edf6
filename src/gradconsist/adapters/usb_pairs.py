"""What a ``semilearn`` algorithm compared in a step: read while its ``train_step`` runs, never computed a second time.

A masking hook changes its own state (FlexMatch's counts, FreeMatch's and SoftMatch's averages), and so would a second
call of it. Each algorithm hands the results of its hooks to ``consistency_loss(logits, targets, name, mask)``, and
makes its probabilities by ``compute_prob``: both are attributes of the algorithm, and are listened to there.

Index letters: B unlabeled samples of a step, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gradconsist.errors import LossContractError
from gradconsist.types import ViewPair

#: The names of the two views in a step's batch.
VIEWS = ("x_ulb_w", "x_ulb_s")


@dataclass(frozen=True)
class ConsistencyCall:
    """One call of the algorithm's ``consistency_loss``.

    Attributes:
        logits: the student's logits [B, C].
        targets: class indices [B] or probabilities [B, C].
        mask: weights [B], or None.
        loss: what it returned.
    """

    logits: Tensor
    targets: Tensor
    mask: Tensor | None
    loss: Tensor


@dataclass
class Listener:
    """A context in which the algorithm's own calls are noted; what it replaced is back afterwards, errors or not.

    Attributes:
        algorithm: whose calls.
        losses: its calls of ``consistency_loss``, in order.
        probabilities: what its calls of ``compute_prob`` returned, in order.
    """

    algorithm: Any
    losses: list[ConsistencyCall] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)

    def __enter__(self) -> Listener:
        own = vars(self.algorithm)
        self._kept = {name: own[name] for name in ("consistency_loss", "compute_prob") if name in own}
        consistency_loss, compute_prob = self.algorithm.consistency_loss, self.algorithm.compute_prob

        def note_loss(logits: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = consistency_loss(logits, targets, *args, **kwargs)
            mask = kwargs.get("mask", args[1] if len(args) > 1 else None)  # after `name`
            self.losses.append(ConsistencyCall(logits, targets, mask, loss))
            return loss

        def note_probabilities(logits: Tensor) -> Tensor:
            probabilities: Tensor = compute_prob(logits)
            self.probabilities.append(probabilities.detach())
            return probabilities

        own.update(consistency_loss=note_loss, compute_prob=note_probabilities)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        own = vars(self.algorithm)
        for name in ("consistency_loss", "compute_prob"):
            del own[name]
        own.update(self._kept)


def read_pair(algorithm: Any, name: str, batch: Mapping[str, Any], heard: Listener) -> ViewPair:
    """The pair of a step of one of `READERS`' algorithms.

    Args:
        algorithm: the algorithm, after its step.
        name: its key in `READERS`.
        batch: the arguments of its step by name.
        heard: what it did in the step.

    Returns:
        Views, pseudo-labels and weights.

    Raises:
        LossContractError: the step computed its consistency loss never or more than once.
    """
    if len(heard.losses) != 1:
        raise LossContractError(
            f"a step of {type(algorithm).__name__} called `consistency_loss` {len(heard.losses)} times, {name} calls it"
            " once: give `pair_fn(args, kwargs, output) -> ViewPair | None` for this variant of it."
        )
    target, weight = READERS[name](algorithm, heard)
    return ViewPair(batch[VIEWS[0]], batch[VIEWS[1]], target.detach(), weight)


def _masked(algorithm: Any, heard: Listener) -> tuple[Tensor, Tensor | None]:
    """The pseudo-label and the mask of L_u."""
    del algorithm
    call = heard.losses[0]
    return call.targets, call.mask


def _masked_and_sharpened(algorithm: Any, heard: Listener) -> tuple[Tensor, Tensor | None]:
    """The pseudo-label and the mask of L_u, a soft label sharpened by `T`.

    semilearn does not apply `T` there: UDA, and FixMatch and FlexMatch with ``hard_label=False``, take the weak view's
    own probabilities as target. Against its own prediction a view's gradient is zero: nothing could be compared.
    """
    target, mask = _masked(algorithm, heard)
    return (sharpen(target, algorithm.T) if target.is_floating_point() else target), mask


def _teacher(algorithm: Any, heard: Listener) -> tuple[Tensor, Tensor | None]:
    """The teacher's probabilities, with the ramp of L_u."""
    target = heard.losses[0].targets
    return target, _ramp(algorithm, target)


def _two_passes(algorithm: Any, heard: Listener) -> tuple[Tensor, Tensor | None]:
    """The class that both passes together find most likely, with the ramp of L_u.

    With the first pass's probabilities as target the weak view's gradient would be zero. With the mean of both, the
    two residuals would be opposite: the cosine of close views would be -1, and the term would push them apart.
    """
    call = heard.losses[0]
    mean = call.targets + call.logits.detach().to(call.targets.dtype).softmax(dim=-1)
    return mean.argmax(dim=-1), _ramp(algorithm, call.targets)


def _guess(algorithm: Any, heard: Listener) -> tuple[Tensor, Tensor | None]:
    """The sharpened guess of both views before MixUp, which L_u sees only mixed; its class where T sharpens nothing.

    The mean of both predictions itself would make their residuals opposite, as in `_two_passes`.
    """
    first, second = heard.probabilities[:2]
    mean = (first + second) / 2
    return (sharpen(mean, algorithm.T) if algorithm.T < 1 else mean.argmax(dim=-1)), None


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T) / sum p^(1/T), row by row.

    Args:
        probabilities: [B, C].
        temperature: T.

    Returns:
        [B, C].
    """
    powers = probabilities ** (1 / temperature)
    return powers / powers.sum(dim=-1, keepdim=True)


def _ramp(algorithm: Any, target: Tensor) -> Tensor:
    progress = algorithm.it / (algorithm.unsup_warm_up * algorithm.num_train_iter)
    return torch.full(target.shape[:1], min(1.0, max(0.0, progress)), device=target.device)


#: By the name of the algorithm's class, or of one that it derives from: target and weight of its pairs.
READERS: dict[str, Callable[[Any, Listener], tuple[Tensor, Tensor | None]]] = {
    "FixMatch": _masked_and_sharpened,
    "FlexMatch": _masked_and_sharpened,
    "FreeMatch": _masked,
    "SoftMatch": _masked,
    "UDA": _masked_and_sharpened,
    "MeanTeacher": _teacher,
    "PiModel": _two_passes,
    "MixMatch": _guess,
    "PseudoLabel": _masked,
}
