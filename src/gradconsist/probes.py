"""What is found out about a model by trying, once: on the first call in each train mode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradconsist.batch import concatenable, concatenate, take
from gradconsist.default_loss import cross_entropy, find_logits
from gradconsist.errors import InputShapeError, InputValueError, LossContractError, UnsupportedModuleError
from gradconsist.forward import PerSampleForward, comparison_scope
from gradconsist.graph import check_first_derivative
from gradconsist.randomness import preserved_randomness
from gradconsist.validation import Pairs


@dataclass
class Probed:
    """What is known of one model, kept by its loss from call to call.

    Attributes:
        seen: facts that were looked at, with the train mode in which they were.
        classes: width of the logits; None where there are none, or before the first call.
    """

    seen: set[tuple[str, bool]] = field(default_factory=set)
    classes: int | None = None

    def first_time(self, fact: str, training: bool) -> bool:
        """Whether `fact` was not asked for before in this train mode; from now on it was."""
        new = (fact, training) not in self.seen
        self.seen.add((fact, training))
        return new


def probe_model(forward: PerSampleForward, pairs: Pairs, probed: Probed) -> None:
    """On the first call in a train mode, tries the model on one pair; on every call, checks targets by its classes.

    Args:
        forward: the model under this call's rules.
        pairs: the call's pairs.
        probed: what is known so far; added to.

    Raises:
        LossContractError: the loss does not depend on the model's parameters.
        UnsupportedModuleError: a sample's output depends on its neighbours.
        InputValueError: a class index is outside the model's classes.
        InputShapeError: probabilities have another width than the logits.
    """
    if probed.first_time("one pair", forward.model.training):
        # With random numbers of its own: a first call must draw the masks that any other call would.
        with preserved_randomness(pairs.device, seed=0):
            _try_one_pair(forward, pairs, probed)
    if forward.loss_fn is cross_entropy and probed.classes is not None:
        _check_classes(pairs.target, probed.classes)
    if probed.first_time("loss", forward.model.training):
        with preserved_randomness(pairs.device, seed=0), torch.enable_grad():
            loss = forward.losses(take(pairs.weak, slice(0, 1)), pairs.target[:1])
        check_first_derivative(loss)
        if not loss.requires_grad:
            raise LossContractError(
                "the per-sample loss has no graph: `loss_fn` or the model detaches its result (`.detach()`, `.item()`,"
                " `no_grad`, NumPy). Return a tensor that depends on the model's parameters."
            )


def _try_one_pair(forward: PerSampleForward, pairs: Pairs, probed: Probed) -> None:
    # Dropout off, whatever the comparison does: the same sample twice must give the same numbers.
    quiet = PerSampleForward(forward.model, forward.loss_fn, forward.batchnorm, autocast=forward.autocast)
    with comparison_scope(forward.model, dropout=False):
        with torch.no_grad():
            output = quiet.output(take(pairs.weak, slice(0, 1)))
        _check_independence(quiet, pairs, output)
    logits = find_logits(output)
    probed.classes = logits.shape[1] if logits is not None and logits.dim() == 2 else None


def _check_independence(forward: PerSampleForward, pairs: Pairs, alone: Any) -> None:
    """A sample's logits must be the same beside another sample."""
    if not concatenable(pairs.weak, pairs.strong):
        return
    first = slice(0, 1)
    with torch.no_grad():
        together = forward.output(concatenate(take(pairs.weak, first), take(pairs.strong, first)))
    a, b = find_logits(alone), find_logits(together)
    if a is None or b is None or a.shape[1:] != b.shape[1:] or not a.is_floating_point():
        return
    half = forward.autocast is not None or a.dtype in (torch.float16, torch.bfloat16)
    tolerance = 5e-2 if half else 1e-8 if a.dtype == torch.float64 else 1e-3
    if bool((a[0] - b[0]).abs().max() > tolerance * b.abs().max()):
        raise UnsupportedModuleError(
            "the model's output for a sample changes with the other samples of the batch, beyond BatchNorm: a layer"
            " normalises, sorts or routes over the batch. A per-sample gradient is not defined there: put that layer in"
            " eval mode, or replace it."
        )


def _check_classes(target: Tensor, classes: int) -> None:
    if target.dim() == 1 and int(target.max()) >= classes:
        raise InputValueError(
            f"`target` has class {int(target.max())}, the model has {classes} classes (0 to {classes - 1})."
        )
    if target.dim() == 2 and target.shape[1] != classes:
        raise InputShapeError(f"`target` has {target.shape[1]} columns, the model has {classes} classes.")
