"""Checks that a model computes each sample by itself, by running samples alone and together with others.

A model may ask a question of its data (``if mask.all()``) which a batch answers otherwise than a sample alone. Engines
give each sample the answer that it would get alone, so samples are compared among those of the same answers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradconsist._consistency.mixing import mixing_refusal
from gradconsist._forward.batchnorm import WEAK
from gradconsist._forward.per_sample import PerSampleForward
from gradconsist._inputs.batch import doubled, leaves, map_members, take
from gradconsist._inputs.cross_entropy import find_logits
from gradconsist._inputs.precision import has_float64
from gradconsist.errors import UnsupportedModuleError
from gradconsist.types import Inputs


class _Answers(TorchDispatchMode):
    """Records the numbers that are read from tensors inside the block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[bool | int | float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not isinstance(found, Tensor) and isinstance(found, bool | int | float):
            self.answers.append(found)
        return found


def samples_together(available: int) -> int:
    """Returns how many samples to run together: multiples of small numbers, by which a model may reshape a batch."""
    return next((size for size in (48, 24, 12, 6, 4, 3) if size <= available), 2)


def independent(
    quiet: PerSampleForward, inputs: Inputs, target: Tensor, *, chance: bool, tell: Callable[[], None]
) -> bool:
    """Checks that samples have the same numbers alone, with one other and with many.

    Calls `tell` if a batch has other numbers because its samples answer conditions differently.

    Returns:
        Whether that is certain. It is not where the samples are equal, where numbers are not finite, or with `chance`.

    Raises:
        UnsupportedModuleError: the model mixes samples, or gives one other numbers in a second call.
    """
    singles: dict[int, list[Tensor]] = {}

    def run(rows: Tensor) -> list[Tensor]:
        return _numbers(quiet, take(inputs, rows), target[rows])

    first = torch.tensor([0], device=target.device)
    singles[0] = run(first)
    if _differ(singles[0], run(first), 0.0):
        if chance:  # allowed, and hides any effect of neighbours
            return False
        raise UnsupportedModuleError(
            "the model gives one sample different outputs in two calls: it draws random numbers that"
            " `dropout='off'` does not reach, or keeps a state. Put that part in eval mode, or use `dropout='on'`."
        )
    other = _first_different(inputs)
    if other is None:
        return False
    order = torch.tensor([0, other, *(row for row in range(1, len(target)) if row != other)], device=target.device)
    most, tolerance = samples_together(len(order)), rounding(quiet, singles[0])

    def changed(rows: Tensor, *, first: bool = True) -> int | None:
        """Finds a place whose sample has other numbers among these rows than alone."""
        together, size = run(rows), len(rows)
        # Not the first one only, since it may change others: along the batch as time, or by its larger maximum.
        places = {0, 1, *range(0, size, max(1, size // 8)), size - 1} if first else set()
        if size > 3:  # rare samples may be the only ones that change, so those with other numbers in half of the rows
            for start, half in ((0, rows[: size // 2]), (size // 2, rows[size // 2 :])):
                places |= _unlike(together, run(half), start, tolerance)
        for place in sorted(places):
            row = int(rows[place])
            single = singles[row] if row in singles else singles.setdefault(row, run(rows[place : place + 1]))
            beside = [part[place : place + 1] for part in together]
            if _differ(single, beside, tolerance) and not _only_rounding(quiet, inputs, target, rows, place):
                return place
        return None

    split = False
    for number, some in enumerate([order[:2], *order.split(most)]):  # two first, which shows best where they mix
        if changed(some, first=number < 2) is None:
            continue
        for rows in _of_one_answer(run, some):
            place = changed(rows)
            if place is not None:
                alone = partial(run, rows[place : place + 1])
                raise mixing_refusal(quiet.model, alone, partial(run, rows), tolerance, place, len(rows))
        split = True
    if split:
        tell()
    return bool(torch.isfinite(torch.cat([single[-1] for single in singles.values()])).all())  # NaN shows nothing


def _of_one_answer(run: Callable[[Tensor], object], rows: Tensor) -> list[Tensor]:
    """Groups rows by what the model's conditions answer for each of them alone, as the engines split a chunk.

    A floating point number that depends on the sample may be a part of its result, not a condition
    (``x / x.max().item()``). So two such rows stay together; of more, only the first two say whether the model mixes.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    reads_floats = False
    for place in range(len(rows)):
        with _Answers() as found:
            run(rows[place : place + 1])
        reads_floats |= any(isinstance(answer, float) for answer in found.answers)
        groups.setdefault(tuple(map(repr, found.answers)), []).append(place)  # in which nan equals nan
    if reads_floats and len(groups) > 1:
        return [rows] if len(rows) == 2 else []
    return [rows[places] for places in groups.values() if len(places) > 1]


def rounding(forward: PerSampleForward, numbers: list[Tensor]) -> float:
    """Returns how much results in a batch may differ from those of one sample, given the coarsest dtype used."""
    dtypes = {tensor.dtype for tensor in (*forward.model.parameters(), *numbers)}
    if forward.autocast is not None or dtypes & {torch.float16, torch.bfloat16}:
        return 5e-2
    return 1e-3 if torch.float32 in dtypes else 1e-8


def _only_rounding(forward: PerSampleForward, inputs: Inputs, target: Tensor, rows: Tensor, place: int) -> bool:
    """Tells whether a sample among `rows` differed only by rounding, which deep models amplify: tries in float64."""
    tensors = {**dict(forward.model.named_buffers()), **dict(forward.model.named_parameters())}
    if all(tensor.dtype == torch.float64 for tensor in tensors.values() if tensor.is_floating_point()):
        return False  # the difference was in float64 already
    if not has_float64(target.device):
        return False
    # Integer buffers are left out: a BatchNorm given the user's own counter would count these forwards in it.
    double = {name: doubled(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    exact = PerSampleForward(forward.model, forward.loss_fn, forward.batchnorm, parameters=double)
    inputs, target = map_members(doubled, take(inputs, rows)), doubled(target[rows])
    try:
        with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
            one = slice(place, place + 1)
            alone = _numbers(exact, take(inputs, one), target[one])
            together = _numbers(exact, inputs, target)
    except RuntimeError:  # a model that insists on its dtype
        return False
    return alone[0].dtype == torch.float64 and not _differ(alone, [part[one] for part in together], 1e-8)


def _numbers(forward: PerSampleForward, inputs: Inputs, target: Tensor) -> list[Tensor]:
    """Returns what must not depend on neighbours: the logits, if there are any, and the losses."""
    # All samples get the weak view's constants, because views do not matter here.
    logits = find_logits(forward.output(inputs, WEAK))
    losses = forward.losses(inputs, target, view=WEAK)
    return [losses] if logits is None or not logits.is_floating_point() else [logits, losses]


def _differ(first: list[Tensor], second: list[Tensor], tolerance: float) -> bool:
    """Tells whether finite numbers differ by more than `tolerance` of the largest, or shapes do."""
    for a, b in zip(first, second, strict=True):
        finite = torch.isfinite(a) & torch.isfinite(b)  # NaN has another cause, and raises another error
        if a.shape != b.shape or bool(((a - b).abs() > tolerance * b.abs().amax().clamp(min=1e-3))[finite].any()):
            return True
    return False


def _unlike(together: list[Tensor], half: list[Tensor], start: int, tolerance: float) -> set[int]:
    """Returns the first few places whose sample has other numbers in `half`, which begins at place `start`."""
    found: set[int] = set()
    for a, b in zip(together, half, strict=True):
        a = a[start : start + len(b)]
        if a.shape == b.shape:
            a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
            differ = ((a - b).abs() > tolerance * b.abs().amax(1, keepdim=True).clamp(min=1e-3)).any(1)
            found |= {start + int(place) for place in differ.nonzero()[:2]}
    return found


def _first_different(inputs: Inputs) -> int | None:
    """Returns the index of the first sample that differs from sample 0, or None."""
    different = torch.stack([(leaf != leaf[:1]).reshape(len(leaf), -1).any(1) for leaf in leaves(inputs)]).any(0)
    return int(different.nonzero()[0]) if bool(different.any()) else None
