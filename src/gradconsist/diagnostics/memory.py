"""`memory_report`: measures what a loss costs on its model with each setting, and recommends one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from gradconsist._inputs.options import check_count, check_number
from gradconsist._inputs.parameters import Encoder, trainable_parameters
from gradconsist.diagnostics.peaks import peak_of, seconds_of
from gradconsist.diagnostics.same_loss import unobserved
from gradconsist.engines import ENGINES, Engine
from gradconsist.errors import GradConsistError, InputTypeError, InputValueError
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.types import ViewPair


@dataclass(frozen=True)
class CostRow:
    """One setting, with the names of `memory_report`'s arguments, and its cost.

    Attributes:
        pairs: number of pairs that a call compares.
        seconds: time of a whole call and its backward, per average step (divided by `every`); None if it was not run.
        bytes: peak memory of a whole call and its backward; None if it was not run.
        reason: why it was not run, or the error.
    """

    encoder: str
    engine: str
    chunk_size: int | str | None
    max_pairs: int | None
    every: int
    stop_gradient: str | None
    pairs: int = 0
    seconds: float | None = None
    bytes: int | None = None
    reason: str | None = None

    @property
    def exact(self) -> bool:
        """Whether every pair is compared in every step, with both gradients differentiated."""
        return self.max_pairs is None and self.every == 1 and self.stop_gradient is None

    def options(self) -> str:
        """Writes the setting as arguments."""
        parts = [f"engine={self.engine}", f"chunk_size={self.chunk_size!r}"]
        parts += [f"max_pairs={self.max_pairs}"] if self.max_pairs is not None else []
        parts += [f"stop_gradient={self.stop_gradient!r}"] if self.stop_gradient is not None else []
        parts += [f"every={self.every}"] if self.every > 1 else []
        return f"{self.encoder}: " + ", ".join(parts)


@dataclass(frozen=True)
class CostReport:
    """What `memory_report` found.

    Attributes:
        rows: one row per setting, in the given order.
        recommended: the setting to use; None if all exceed the limits.
        peak: explains what the bytes measure.
    """

    rows: list[CostRow] = field(repr=False)
    recommended: CostRow | None
    peak: str

    def __str__(self) -> str:
        chosen = self.recommended.options() if self.recommended else "none of these is within the limits"
        lines = [f"recommended: {chosen}", f"{'seconds':>9} {'MB':>8}  setting"]
        for row in self.rows:
            seconds = "-" if row.seconds is None else f"{row.seconds:.3f}"
            size = "-" if row.bytes is None else f"{row.bytes / 1e6:.1f}"
            lines.append(f"{seconds:>9} {size:>8}  {row.options()}" + (f" ({row.reason})" if row.reason else ""))
        return "\n".join([*lines, f"MB: {self.peak}"])


def memory_report(
    consistency: GradientConsistencyLoss,
    batch: ViewPair | Sequence[Any],
    *,
    encoders: Mapping[str, Encoder] | None = None,
    engines: Iterable[str | Engine] | None = None,
    chunk_sizes: Iterable[int | str | None] = ("auto", None),
    max_pairs: Iterable[int | None] = (None,),
    every: Iterable[int] = (1,),
    stop_gradient: Iterable[str | None] = (None, "weak"),
    max_bytes: float = math.inf,
    max_seconds: float = math.inf,
) -> CostReport:
    """Measures time and peak memory of L_g and its gradient for every combination of the given options.

    Each setting runs three times: to warm up, for its seconds, and for its peak. On a CPU, bytes are the most that
    torch's allocator holds above what it held before; on CUDA, its own peak (which is reset). Neither seconds nor bytes
    include the method's own part of the step. Add its seconds; the peaks of two parts that run one after the other do
    not add up. Smaller chunks run first: once one exceeds `max_bytes`, larger ones are not run.

    The report recommends the fastest exact setting within the limits. If there is none, it recommends the one that
    compares the most pairs per step, with settings that hold a view constant last. Encoders that come first are
    preferred.

    Args:
        consistency: the loss, with the other options that you train with. It and its model do not change.
            ``batchnorm="observed"`` is tried with joint statistics.
        batch: a `ViewPair`, or weak and strong views, target and optionally weight; use the size of a training step.
        encoders: what to compare, with names that you choose; None means the loss's encoder.
        engines: names or engine objects; None means the loss's engine.
        chunk_sizes: as for the loss.
        max_pairs: as for the loss.
        every: as for `GGCRWrapper`.
        stop_gradient: as for the loss.
        max_bytes: limit on the peak.
        max_seconds: limit on the seconds of an average step.

    Returns:
        The report; ``print(report)`` shows it as a table, with the recommendation first.

    Raises:
        ConfigError: an option has an invalid value, or `consistency` is not a GradientConsistencyLoss.
        InputTypeError: `batch` is not a pair of views with a target.
        InputValueError: no pair has a positive weight.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> gc = GradientConsistencyLoss(torch.nn.Linear(4, 3))
        >>> x, target = torch.randn(16, 4), torch.zeros(16, dtype=torch.long)
        >>> report = memory_report(gc, (x, x + 0.1, target), chunk_sizes=(4, None), stop_gradient=(None,))
        >>> len(report.rows), report.recommended.exact
        (2, True)
    """
    own, pair = unobserved(consistency), _pair(batch)
    check_number("max_bytes", min(max_bytes, 1e300), least=0.0)
    check_number("max_seconds", min(max_seconds, 1e300), least=0.0)
    strides = list(every)
    for stride in strides:
        check_count("every", stride)
    compared = len(pair.target) if pair.weight is None else int((pair.weight != 0).sum())
    if compared == 0:
        raise InputValueError("no pair of `batch` has a positive weight, so nothing is compared: give one.")
    choices = product(
        (encoders or {"all" if own.encoder is None else "encoder": own.encoder}).items(),
        (own.engine,) if engines is None else engines,
        stop_gradient, list(max_pairs), list(chunk_sizes),
    )  # fmt: skip
    settings = []
    for (name, encoder), engine, constant, most, size in choices:
        loss = consistency.with_options(  # build all of them first, so that mistakes show before anything runs
            encoder=encoder, engine=engine, stop_gradient=constant, max_pairs=most, chunk_size=size,
            batchnorm=own.batchnorm, fused=True, reduction="mean",
        )  # fmt: skip
        row = CostRow(name, _name(engine), size, most, 1, constant, min(compared, most or compared))
        settings.append((row, loss))
    device = next(iter(trainable_parameters(own.model).values())).device
    found: dict[int, CostRow] = {}
    too_large: set[tuple[Any, ...]] = set()
    for number in sorted(range(len(settings)), key=lambda number: _size(settings[number][0])):
        row, loss = settings[number]
        kind = (row.encoder, row.engine, row.stop_gradient, row.max_pairs)
        if kind in too_large:
            found[number] = replace(row, reason="not run: a smaller chunk was beyond `max_bytes`")
            continue
        found[number] = row = _measured(row, loss, pair, device)
        too_large |= {kind} if row.bytes is not None and row.bytes > max_bytes else set()
    rows = [_spread(found[number], stride) for number in range(len(settings)) for stride in strides]
    return CostReport(rows, _best(rows, max_bytes, max_seconds), _meaning(device))


def _pair(batch: Any) -> ViewPair:
    if not isinstance(batch, Sequence) or not 3 <= len(batch) <= 4:
        raise InputTypeError(
            f"`batch` is of type {type(batch).__name__}: pass a ViewPair, or (weak, strong, target) with or without"
            " a weight."
        )
    return ViewPair(*batch)


def _name(engine: str | Engine) -> str:
    """Writes the engine as you would write the argument `engine`."""
    if isinstance(engine, str):
        return repr(engine)
    return next((repr(name) for name, build in ENGINES.items() if repr(build()) == repr(engine)), repr(engine))


def _size(row: CostRow) -> float:
    return {"auto": 0.0, None: math.inf}.get(row.chunk_size, row.chunk_size)  # type: ignore[arg-type,return-value]


def _measured(row: CostRow, loss: GradientConsistencyLoss, pair: ViewPair, device: torch.device) -> CostRow:
    def call() -> None:
        value = loss(*pair)
        with torch.no_grad():  # the node itself: a backward would run the user's gradient hooks
            value.grad_fn.apply(torch.ones_like(value))  # type: ignore[union-attr]

    try:
        with torch.inference_mode(False), torch.enable_grad():
            call()
            return replace(row, seconds=seconds_of(call, device), bytes=peak_of(call, device))
    except (GradConsistError, torch.OutOfMemoryError) as error:
        return replace(row, reason=str(error))


def _meaning(device: torch.device) -> str:
    if device.type != "cpu":
        return f"peak of torch's {device.type.upper()} allocator above what was allocated before"
    return "peak of what torch's CPU allocator holds above what it held before, by its profiler's record"


def _spread(row: CostRow, every: int) -> CostRow:
    """Makes the row for the same call on every k-th step only."""
    return replace(row, every=every, seconds=None if row.seconds is None else row.seconds / every)


def _best(rows: list[CostRow], max_bytes: float, max_seconds: float) -> CostRow | None:
    order = list(dict.fromkeys(row.encoder for row in rows))

    def worth(row: CostRow) -> tuple[Any, ...]:
        pairs = -row.pairs / row.every
        return (not row.exact, row.stop_gradient is not None, order.index(row.encoder), pairs, row.seconds)

    def fits(row: CostRow) -> bool:
        return (
            row.seconds is not None and row.bytes is not None and row.bytes <= max_bytes and row.seconds <= max_seconds
        )

    return min((row for row in rows if fits(row)), key=worth, default=None)
