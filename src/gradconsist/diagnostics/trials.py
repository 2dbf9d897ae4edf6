"""Trial calls of one setting of the loss: what it costs by prediction and by measurement."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist.batch import check_inputs, take
from gradconsist.diagnostics.peaks import kept_by, peak_of, seconds_of
from gradconsist.engines import Engine, make_engine
from gradconsist.engines.base import Problem
from gradconsist.errors import GradConsistError, InputValueError
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.selection import Encoder, trainable_parameters
from gradconsist.similarity import GradProducts
from gradconsist.types import LossFunction, ViewPair

_TRIAL = 4  # pairs of the calls from which the rest is predicted


@dataclass(frozen=True)
class CostRow:
    """One setting, and its cost by prediction and by measurement.

    Attributes:
        encoder: name of the compared part, as it was given.
        engine: as for the loss.
        chunk_size: as for the loss.
        max_pairs: as for the loss.
        every: as for `GGCRWrapper`; seconds are those of an average step.
        stop_gradient: as for the loss.
        chunk: pairs at a time that `chunk_size` amounts to.
        pairs: pairs that a call compares.
        predicted_seconds: from calls with 1 and 4 pairs; see `memory_report`.
        predicted_bytes: likewise.
        seconds: of a whole call and its backward, divided by `every`; None if it was not run.
        bytes: their peak; None if it was not run.
        reason: why it was not run, or what was refused.
    """

    encoder: str
    engine: str
    chunk_size: int | str | None
    max_pairs: int | None
    every: int
    stop_gradient: str | None
    chunk: int = 0
    pairs: int = 0
    predicted_seconds: float = math.nan
    predicted_bytes: int = 0
    seconds: float | None = None
    bytes: int | None = None
    reason: str | None = None

    @property
    def exact(self) -> bool:
        """Whether every pair is compared in every step, with both gradients differentiated."""
        return self.max_pairs is None and self.every == 1 and self.stop_gradient is None

    def options(self) -> str:
        """The setting as arguments."""
        parts = [f"engine={self.engine!r}", f"chunk_size={self.chunk_size!r}"]
        parts += [f"max_pairs={self.max_pairs}"] if self.max_pairs is not None else []
        parts += [f"stop_gradient={self.stop_gradient!r}"] if self.stop_gradient is not None else []
        parts += [f"every={self.every}"] if self.every > 1 else []
        return f"{self.encoder}: " + ", ".join(parts)


class Trials:
    """One encoder, engine and constant view: a few trial calls serve all its chunk sizes and subsets.

    Args:
        model: the user's model.
        pair: the whole batch.
        encoder: as for the loss.
        engine: as for the loss.
        constant: as `stop_gradient` of the loss.
        loss_fn: as for the loss.
        batchnorm: as for the loss.
        device: where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        pair: ViewPair,
        encoder: Encoder,
        engine: str | Engine,
        constant: Any,
        loss_fn: LossFunction | None,
        batchnorm: Any,
        device: torch.device,
    ) -> None:
        self.device, self.pair = device, pair
        weight = torch.ones(len(pair.target), device=device) if pair.weight is None else pair.weight
        self.weight = weight
        self.index = (weight != 0).nonzero().squeeze(1)
        if not len(self.index):
            raise InputValueError("no pair of `batch` has a positive weight, so nothing is compared: give one.")
        self.witness = _Witness(make_engine(copy.deepcopy(engine)))  # which may learn to fall back, here and not there
        self.options: dict[str, Any] = {
            "encoder": encoder, "engine": self.witness, "stop_gradient": constant, "loss_fn": loss_fn,
            "batchnorm": batchnorm,
        }  # fmt: skip
        self.model = model
        self.refusal: str | None = None
        try:
            self._try()
        except GradConsistError as error:
            self.refusal = str(error)

    def _call(self, pair: ViewPair, chunk: int | str | None, most: int | None = None) -> Any:
        loss = GradientConsistencyLoss(self.model, chunk_size=chunk, max_pairs=most, **self.options)  # type: ignore[arg-type]
        parameters = list(trainable_parameters(self.model).values())

        def run() -> None:
            value = loss(*pair)
            torch.autograd.grad(value, parameters, allow_unused=True)

        return run

    def _try(self) -> None:
        few = min(_TRIAL, len(self.index))
        one, some = (self.weight.clone() for _ in range(2))
        one[self.index[1:]] = 0
        some[self.index[few:]] = 0
        weighted = [self.pair._replace(weight=weight) for weight in (one, some, some)]
        chunks: list[int | str] = ["auto", few, 1]
        calls = [self._call(pair, chunk) for pair, chunk in zip(weighted, chunks, strict=True)]
        for call in calls:
            call()
        self.seconds = [min(seconds_of(call, self.device) for _ in range(2)) for call in calls]
        self.bytes = [peak_of(call, self.device) for call in calls[:2]]
        self.few = few
        # Where the statistics are taken of all inputs, the peak of a few pairs is that forward's, and hides their own.
        few_inputs = [self.index[: min(count, len(self.index))] for count in (2, 6)]
        calls = [self._call(self._taken(index), None) for index in few_inputs]
        for call in calls:
            call()
        more = max(1, len(few_inputs[1]) - len(few_inputs[0]))
        # Likewise the gradients of a large model hide the graph of a few pairs, which what it keeps tells.
        peaks, kept = ([measure(call) for call in calls] for measure in (self._peak, kept_by))
        self.bytes_a_pair = max(0.0, peaks[1] - peaks[0], kept[1] - kept[0]) / more

    def _peak(self, call: Callable[[], object]) -> int:
        return peak_of(call, self.device)

    def _taken(self, index: Tensor) -> ViewPair:
        """The batch that has these pairs only."""
        rows = index.to(self.pair.target.device)
        weak, strong = (take(check_inputs(name, getattr(self.pair, name)), rows) for name in ("weak", "strong"))
        return ViewPair(weak, strong, self.pair.target[rows], self.weight[rows])

    def cost(self, row: CostRow, max_bytes: float, max_seconds: float, *, measure: bool) -> CostRow:
        """The row with its prediction, and with a measurement where the limits allow one."""
        if self.refusal is not None:
            return replace(row, reason=self.refusal)
        pairs = min(len(self.index), row.max_pairs or len(self.index))
        chunk = self._chunk(row.chunk_size, pairs)
        row = replace(row, chunk=chunk, pairs=pairs)
        row = replace(row, predicted_seconds=self._predict_seconds(row), predicted_bytes=self._predict_bytes(row))
        if not measure:
            return row
        if row.predicted_bytes > max_bytes or row.predicted_seconds > max_seconds:
            return replace(row, reason="not run: its prediction is beyond a limit")
        call = self._call(self.pair._replace(weight=self.weight), row.chunk_size, row.max_pairs)
        try:
            call()
            return replace(row, seconds=seconds_of(call, self.device), bytes=peak_of(call, self.device))
        except (GradConsistError, torch.OutOfMemoryError) as error:
            return replace(row, reason=str(error))

    def _chunk(self, size: Any, pairs: int) -> int:
        if isinstance(size, int):
            return min(size, pairs)
        most = min(self.witness.preferred or pairs, pairs) if size == "auto" else pairs
        return math.ceil(pairs / math.ceil(pairs / most)) if pairs else 0

    def _predict_seconds(self, row: CostRow) -> float:
        one, together, apart = self.seconds
        if self.few == 1:
            return one * max(1, row.pairs)
        a_chunk = max(0.0, (apart - together) / (self.few - 1))
        a_pair = max(0.0, (together - one) / (self.few - 1))
        chunks = math.ceil(row.pairs / row.chunk) if row.chunk else 0
        return max(0.0, one - a_chunk - a_pair) + a_chunk * chunks + a_pair * row.pairs

    def _predict_bytes(self, row: CostRow) -> int:
        one, together = self.bytes
        return max(one, int(together + self.bytes_a_pair * (row.chunk - self.few)))


class _Witness:
    """An engine that remembers how many pairs it would take at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Any = engine
        self.preferred: int | None = None
        if hasattr(engine, "preferred_chunk"):
            self.preferred_chunk = self._preferred_chunk
        if hasattr(engine, "fall_back"):
            self.fall_back = self._fall_back

    @property
    def recall_bytes(self) -> int:
        return getattr(self.engine, "recall_bytes", 0)

    def products(self, problem: Problem) -> GradProducts:
        found: GradProducts = self.engine.products(problem)
        return found

    def _preferred_chunk(self, problem: Problem) -> int:
        self.preferred = int(self.engine.preferred_chunk(problem))
        return self.preferred

    def _fall_back(self, error: RuntimeError) -> AbstractContextManager[None]:
        entered: AbstractContextManager[None] = self.engine.fall_back(error)
        return entered

    def __repr__(self) -> str:
        return repr(self.engine)
