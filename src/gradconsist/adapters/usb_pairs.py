"""Records what a ``semilearn`` algorithm compared in a step while its ``train_step`` runs, so nothing runs twice.

A masking hook changes its own state (FlexMatch's counts, FreeMatch's and SoftMatch's averages), so calling it again
would change that again. Every algorithm passes the results of its hooks to ``consistency_loss(logits, targets, name,
mask)`` and computes its probabilities with ``compute_prob``. Both are attributes of the algorithm, so calls can be
recorded there.

Index letters: B unlabeled samples of a step, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradconsist.errors import LossContractError
from gradconsist.types import ViewPair

#: Names of the two views in a step's batch.
VIEWS = ("x_ulb_w", "x_ulb_s")


@dataclass(frozen=True)
class ConsistencyCall:
    """One call of the algorithm's ``consistency_loss``.

    Attributes:
        logits: the student's logits [B, C].
        targets: class indices [B] or probabilities [B, C].
        mask: weights [B], or None.
        loss: its return value.
    """

    logits: Tensor
    targets: Tensor
    mask: Tensor | None
    loss: Tensor


@dataclass
class Listener:
    """Records the algorithm's calls of ``consistency_loss``, and the results of its calls of ``compute_prob``."""

    algorithm: Any
    losses: list[ConsistencyCall] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the calls inside the block; after it, even by an error, the algorithm is as it was."""
        own = vars(self.algorithm)
        kept = {name: own[name] for name in ("consistency_loss", "compute_prob") if name in own}
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
        try:
            yield
        finally:
            del own["consistency_loss"], own["compute_prob"]
            own.update(kept)


def read_pair(algorithm: Any, name: str, batch: Mapping[str, Any], heard: Listener) -> ViewPair:
    """Builds the pair of a step from its arguments (`batch`) and its calls; `name` is the algorithm's in `READERS`."""
    if len(heard.losses) != 1:
        raise LossContractError(
            f"a step of {type(algorithm).__name__} called `consistency_loss` {len(heard.losses)} times, {name} calls it"
            " once: give `pair_fn(args, kwargs, output) -> ViewPair | None` for this variant of it."
        )
    target, weight = READERS[name](algorithm, heard)
    return ViewPair(batch[VIEWS[0]], batch[VIEWS[1]], target.detach(), weight)


def _masked(algorithm: Any, heard: Listener) -> tuple[Tensor, Tensor | None]:
    """Reads the pseudo-label and the mask of L_u."""
    del algorithm
    call = heard.losses[0]
    return call.targets, call.mask


def _masked_and_sharpened(algorithm: Any, heard: Listener) -> tuple[Tensor, Tensor | None]:
    """Reads the pseudo-label and the mask of L_u, and sharpens a soft label with `T`.

    semilearn does not apply `T` there: UDA, and FixMatch and FlexMatch with ``hard_label=False``, use the weak view's
    own probabilities as target. With its own prediction as target, a view's gradient is zero, so there would be nothing
    to compare.
    """
    target, mask = _masked(algorithm, heard)
    return (sharpen(target, algorithm.T) if target.is_floating_point() else target), mask


def _teacher(algorithm: Any, heard: Listener) -> tuple[Tensor, Tensor | None]:
    """Reads the teacher's probabilities; the weight is the ramp of L_u."""
    target = heard.losses[0].targets
    return target, _ramp(algorithm, target)


def _two_passes(algorithm: Any, heard: Listener) -> tuple[Tensor, Tensor | None]:
    """Finds the class that both passes together find most likely, as `PiModel` does; the weight is the ramp of L_u."""
    call = heard.losses[0]
    mean = call.targets + call.logits.detach().to(call.targets.dtype).softmax(dim=-1)
    return mean.argmax(dim=-1), _ramp(algorithm, call.targets)


def _guess(algorithm: Any, heard: Listener) -> tuple[Tensor, Tensor | None]:
    """Computes the sharpened guess of both views before MixUp (L_u sees it only mixed), or its class if T >= 1.

    With T >= 1 nothing is sharpened, and the plain mean has the fault that `methods.PiModel` explains.
    """
    first, second = heard.probabilities[:2]
    mean = (first + second) / 2
    return (sharpen(mean, algorithm.T) if algorithm.T < 1 else mean.argmax(dim=-1)), None


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """Computes p^(1/T) / sum p^(1/T) per row."""
    return (probabilities.log() / temperature).softmax(dim=-1)  # a small T would underflow as a power


def _ramp(algorithm: Any, target: Tensor) -> Tensor:
    progress = algorithm.it / (algorithm.unsup_warm_up * algorithm.num_train_iter)
    return torch.full(target.shape[:1], min(1.0, max(0.0, progress)), device=target.device)


#: Maps the name of the algorithm's class, or of one of its base classes, to a reader of its pairs' target and weight.
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
