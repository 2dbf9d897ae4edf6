"""Warns of a term that can be computed but does nothing useful; each warning comes once, from logger "gradconsist"."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from torch import Tensor

from gradconsist._consistency.similarity import Criterion, Disagreement
from gradconsist.types import ConsistencyRecord

logger = logging.getLogger("gradconsist")

_IDLE_CALLS = 3  # calls in a row without a pair that has a cosine


def warn_of_probabilities(logits: Tensor) -> bool:
    """Warns if the logits [B, C] look like probabilities, and tells whether it warned."""
    found = logits.shape[1] > 1 and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all())
    if found:
        logger.warning(
            "the model's output looks like probabilities (no entry is negative, rows sum to 1), and the default loss"
            " applies another softmax: take the softmax out of the model, or pass a `loss_fn` for probabilities,"
            " such as `lambda output, target: torch.nn.functional.nll_loss(output.log(), target, reduction='none')`."
        )
    return found


def warn_of_unreached(unreached: Collection[str], compared: Collection[str]) -> None:
    """Warns of compared parameters that the loss does not depend on."""
    if unreached:
        names = ", ".join(list(unreached)[:3]) + (", ..." if len(unreached) > 3 else "")
        logger.warning(
            "the loss does not depend on %d of %d compared parameters, so their gradients are zero (%s): if they should"
            " be trained, look for a `.detach()` or `no_grad` after them; if not, leave them out with `encoder`.",
            len(unreached),
            len(compared),
            names,
        )


def warn_of_functions(verdicts: Mapping[str, bool]) -> None:
    """Warns of custom Functions whose second derivative could not be tested; `verdicts` tell which were."""
    untested = [name for name, tested in verdicts.items() if not tested]
    if untested:
        logger.warning(
            "the model runs custom autograd code whose second derivative could not be checked: %s. If it is incomplete,"
            " the gradient of L_g is silently wrong: test it with `gradconsist.diagnostics.verify`.",
            ", ".join(untested),
        )


def warn_of_equal_views() -> None:
    """Warns of two views with the same numbers."""
    logger.warning(
        "`weak` and `strong` hold the same numbers in every compared pair, so every cosine is 1 and the loss is 0: pass"
        " two augmentations of the same samples."
    )


def warn_of_conditions() -> None:
    """Warns of a model whose conditions depend on the batch, so that a sample alone is computed otherwise."""
    logger.warning(
        "the model asks something of its whole batch (a longest length, `.any()`, a largest value), and"
        " the answer changes the outputs of single samples. The comparison runs each sample with its own answer, your"
        " method with that of the batch, so the two differ: mask the padding, or decide per sample (`torch.where`)."
    )


class IdleCalls:
    """Warns if no pair had a cosine for several calls, since L_g is then exactly 0 and trains nothing."""

    def __init__(self) -> None:
        self._streak: Tensor | None = None  # calls in a row; on the device, and read only once in several calls
        self._calls = 0
        self._warned = False

    def watch(self, record: ConsistencyRecord, target: Tensor, min_norm: float, criterion: Criterion) -> None:
        """Counts a call that was made for its gradient, and warns if there were too many idle ones."""
        if self._warned or not isinstance(criterion, Disagreement):  # of another criterion, degenerate pairs add terms
            return
        idle = record.compared.any() & (record.degenerate | ~record.compared).all()
        self._streak = idle.long() if self._streak is None else idle * (self._streak.to(idle.device) + 1)
        self._calls += 1
        soft = target.is_floating_point()
        at_once = soft and self._calls == 1  # a soft target that is wrong is wrong from the first call
        if self._calls % _IDLE_CALLS and not at_once:
            return
        calls = int(self._streak)
        self._warned = calls >= (1 if at_once else _IDLE_CALLS)
        if self._warned:
            cause = (
                "The output may be saturated, or a layer after the encoder be zero: see `loss.last`, lower `min_norm`"
            )
            if soft:
                cause = (
                    "`target` may be the model's own prediction of the weak view, whose gradient is zero: use a hard"
                    " pseudo-label (`.argmax(1)`) or a sharpened one"
                )
            logger.warning(
                "every compared pair of the last %d call(s) was degenerate (a gradient of norm at most %g), so the loss"
                " was 0 and trained nothing. %s.",
                calls,
                min_norm,
                cause,
            )
