"""`memory_report`: what the loss will cost on a model, setting by setting, and which setting to take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from gradconsist.diagnostics.trials import CostRow, Trials
from gradconsist.engines import Engine
from gradconsist.errors import ConfigError, InputTypeError
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.selection import Encoder, trainable_parameters
from gradconsist.types import LossFunction, ViewPair
from gradconsist.validation import check_choice, check_count, check_number


@dataclass(frozen=True)
class CostReport:
    """What `memory_report` found.

    Attributes:
        rows: every setting, in the order in which it was given.
        recommended: the one to take; None if none keeps the limits.
        peak: what bytes are.
    """

    rows: list[CostRow] = field(repr=False)
    recommended: CostRow | None
    peak: str

    def __str__(self) -> str:
        lines = [f"{'seconds':>9} {'predicted':>9} {'MB':>8} {'predicted':>9}  setting"]
        for row in self.rows:
            seconds = "-" if row.seconds is None else f"{row.seconds:.3f}"
            size = "-" if row.bytes is None else f"{row.bytes / 1e6:.1f}"
            lines.append(
                f"{seconds:>9} {row.predicted_seconds:>9.3f} {size:>8} {row.predicted_bytes / 1e6:>9.1f}"
                f"  {row.options()}" + (f" ({row.reason})" if row.reason else "")
            )
        chosen = self.recommended.options() if self.recommended else "none of these keeps the limits"
        return "\n".join([*lines, f"MB: {self.peak}", f"recommended: {chosen}"])


def memory_report(
    model: nn.Module,
    batch: ViewPair | Sequence[Any],
    *,
    encoders: Mapping[str, Encoder] | None = None,
    engines: Iterable[str | Engine] = ("auto",),
    chunk_sizes: Iterable[int | str | None] = ("auto", None),
    max_pairs: Iterable[int | None] = (None,),
    every: Iterable[int] = (1,),
    stop_gradient: Iterable[str | None] = (None, "weak"),
    loss_fn: LossFunction | None = None,
    batchnorm: Any = "auto",
    max_bytes: float = math.inf,
    max_seconds: float = math.inf,
    measure: bool = True,
) -> CostReport:
    """Predicts and measures time and peak memory of L_g with its gradient, for every combination of the options given.

    **Prediction.** Three calls with 1, 4 and 4 pairs of positive weight (the 4 in one chunk and in four), on all inputs
    of the batch, so that the forward that takes BatchNorm's statistics is in them as it will be, give the seconds as
    ``fixed + a * chunks + b * pairs``. Bytes are those of the 4, and what a pair adds: the difference between batches
    of 2 and of 6, in their peaks or in what their graphs keep, whichever is more. A setting whose prediction is beyond
    a limit is not run.

    **Measurement.** One call and its backward after a warm-up call, and one more under the profiler. On a CPU bytes are
    what torch's allocator holds at most, above what it held before; on CUDA its own peak (which is reset). The method's
    own part of the step is in neither: add it to both, except that the peaks of two parts that run one after the other
    do not add up.

    **Recommendation.** Of the settings within the limits the fastest exact one, or else the one that compares the most
    pairs a step, constant views last; encoders count in the order in which they are given.

    The model's buffers, modes, ``.grad`` and the random state stay untouched.

    Args:
        model: the user's model.
        batch: a `ViewPair`, or weak and strong views, target and perhaps weight; give it the size of a training step.
        encoders: what to compare, by a name of your own; None is ``{"all": None}``.
        engines: names or engine objects.
        chunk_sizes: as for the loss.
        max_pairs: as for the loss.
        every: as for `GGCRWrapper`.
        stop_gradient: as for the loss.
        loss_fn: as for the loss.
        batchnorm: as for the loss, but not "observed".
        max_bytes: limit on the peak.
        max_seconds: limit on the seconds of an average step.
        measure: False predicts only.

    Returns:
        The report; ``print(report)`` shows it as a table.

    Raises:
        ConfigError: an option has no such value.
        InputTypeError: `batch` is no pair of views with a target.
        InputValueError: no pair has a positive weight.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x, target = torch.randn(16, 4), torch.zeros(16, dtype=torch.long)
        >>> report = memory_report(model, (x, x + 0.1, target), chunk_sizes=(4, None), stop_gradient=(None,))
        >>> len(report.rows), report.recommended.exact
        (2, True)
    """
    pair = _pair(batch)
    check_number("max_bytes", min(max_bytes, 1e300), least=0.0)
    check_number("max_seconds", min(max_seconds, 1e300), least=0.0)
    check_choice("measure", measure, (True, False))
    if batchnorm == "observed":
        raise ConfigError("`batchnorm='observed'` has no method here to observe: use 'auto', 'batch' or 'running'.")
    rows: list[CostRow] = []
    strides, sizes, subsets = list(every), list(chunk_sizes), list(max_pairs)
    for stride in strides:
        check_count("every", stride)
    parts = list(product((encoders or {"all": None}).items(), engines, stop_gradient))
    for ((_, encoder), engine, constant), size, most in product(parts, sizes, subsets):
        given: Any = {"engine": engine, "stop_gradient": constant, "chunk_size": size, "max_pairs": most}
        # A mistake is told before anything runs.
        GradientConsistencyLoss(model, encoder=encoder, loss_fn=loss_fn, batchnorm=batchnorm, **given)
    device = next(iter(trainable_parameters(model).values())).device
    for (name, encoder), engine, constant in parts:
        part = Trials(model, pair, encoder, engine, constant, loss_fn, batchnorm, device)
        for size, most in product(sizes, subsets):
            row = CostRow(name, str(engine), size, most, 1, constant)
            row = part.cost(row, max_bytes, max_seconds * max(strides), measure=measure)
            rows += [_spread(row, stride) for stride in strides]
    return CostReport(rows, _best(rows, max_bytes, max_seconds), _meaning(device))


def _pair(batch: Any) -> ViewPair:
    if not isinstance(batch, Sequence) or not 3 <= len(batch) <= 4:
        raise InputTypeError(
            f"`batch` is a {type(batch).__name__}: pass a ViewPair, or (weak, strong, target) with or without a weight."
        )
    return ViewPair(*batch)


def _meaning(device: torch.device) -> str:
    if device.type == "cuda":
        return "peak of torch's CUDA allocator above what was allocated before"
    return "peak of what torch's CPU allocator holds above what it held before, by its profiler's record"


def _spread(row: CostRow, every: int) -> CostRow:
    """The same call on every k-th step."""
    seconds = None if row.seconds is None else row.seconds / every
    return replace(row, every=every, seconds=seconds, predicted_seconds=row.predicted_seconds / every)


def _best(rows: list[CostRow], max_bytes: float, max_seconds: float) -> CostRow | None:
    """The recommendation; by predictions where nothing was measured."""
    order = list(dict.fromkeys(row.encoder for row in rows))

    def worth(row: CostRow) -> tuple[Any, ...]:
        seconds = row.predicted_seconds if row.seconds is None else row.seconds
        return (not row.exact, row.stop_gradient is not None, order.index(row.encoder), -row.pairs / row.every, seconds)

    def fits(row: CostRow) -> bool:
        seconds = row.predicted_seconds if row.seconds is None else row.seconds
        size = row.predicted_bytes if row.bytes is None else row.bytes
        return row.reason is None and size <= max_bytes and seconds <= max_seconds

    return min((row for row in rows if fits(row)), key=worth, default=None)
