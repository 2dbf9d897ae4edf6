"""The forward that takes BatchNorm's joint statistics, and what of it serves the forwards that follow.

BatchNorm's joint statistics need a forward of all pairs before the first chunk. The chunks then run the same layers
with the same parameters on the same inputs: what a convolution returned is known, and only its graph is missing. It is
kept up to a limit, since it grows with the number of pairs. Where a method's own forwards are observed, they serve the
same end (`observation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradconsist.batch import concatenable, concatenate, leaves
from gradconsist.errors import InputShapeError
from gradconsist.forward import PerSampleForward
from gradconsist.types import Inputs

CONVOLUTIONS = {getattr(torch, f"conv{kind}{dims}d"): 2 + dims for kind in ("", "_transpose") for dims in (1, 2, 3)}


_PART_BYTES = 2**22  # of the input of a convolution that takes a batch in parts
_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}  # of a digest, relative to the input's norm; else 1e-2


class OtherForwardError(Exception):
    """A forward is not the one that is recalled; caught inside the library."""


class Output(NamedTuple):
    """What one convolution returned.

    Attributes:
        rows: [N, ...].
        version: of `rows`, to notice that they were overwritten.
        digest: of each row of the input, [N, 2].
    """

    rows: Tensor
    version: int
    digest: Tensor

    def intact(self) -> bool:
        """Whether the rows are still what the convolution returned."""
        return self.rows._version == self.version


@dataclass(frozen=True)
class Recalled:
    """Outputs of all convolutions of the forwards that weak and strong inputs went through, in the order of the calls.

    Attributes:
        calls: what each call returned in the forward of the weak and of the strong views, which may be one; None where
            an output cannot be told by rows.
        first: rows of the first weak and of the first strong sample.
        pairs: B.
        rows: the pairs that are meant, [n]; None for all.
    """

    calls: tuple[tuple[Output, Output] | None, ...]
    first: tuple[int, int]
    pairs: int
    rows: Tensor | None = None
    _dismissed: list[bool] = field(default_factory=list)  # one for all that were taken

    def take(self, index: Tensor) -> Recalled:
        """The same for the pairs `index`."""
        return replace(self, rows=index if self.rows is None else self.rows[index])

    @property
    def usable(self) -> bool:
        """Whether no forward so far was another one."""
        return not self._dismissed

    def dismiss(self) -> None:
        """A forward was another one, and the others will be: from now on nothing is `usable`."""
        self._dismissed.append(True)

    def output(self, call: int, x: Tensor) -> Tensor | None:
        """What a convolution returned for the samples w0, s0, w1, s1, ...

        Args:
            call: its position in the forward.
            x: its input now, by which the rows are checked: a model may have reordered its batch.

        Returns:
            The output [N, ...], or None if it is unknown.

        Raises:
            OtherForwardError: the input is not the one of that call.
        """
        known = self.calls[call]
        if known is None or any(each.rows.dtype != x.dtype for each in known):
            return None
        weak, strong = known
        pairs = torch.arange(self.pairs, device=x.device) if self.rows is None else self.rows
        rows = torch.stack([pairs + self.first[0], pairs + self.first[1]], 1)
        before = torch.stack([weak.digest[rows[:, 0]], strong.digest[rows[:, 1]]], 1).flatten(0, 1)
        digest, norm = _digest(x), x.detach().flatten(1).norm(dim=1, keepdim=True)
        bound = norm.to(digest.dtype) * _TOLERANCE.get(x.dtype, 1e-2)
        if len(before) != len(x) or bool(((digest - before).abs() > bound).any()):
            raise OtherForwardError
        if weak is strong:
            return weak.rows.index_select(0, rows.flatten())
        views = [each.rows.index_select(0, rows[:, view]) for view, each in enumerate(known)]
        return torch.stack(views, 1).flatten(0, 1)


def _digest(x: Tensor) -> Tensor:
    """Two projections of each row [C, ...], on waves over channels times waves over positions, in float32 at least."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
    channels, positions = (
        torch.stack([torch.cos(1.7 * steps), torch.cos(0.9 * steps + 1.0)])
        for steps in (torch.arange(size, dtype=wide.dtype, device=x.device) for size in wide.shape[1:])
    )
    with torch.autocast(x.device.type, enabled=False):
        # Waves first: with the two columns on the right, a product of matrices takes nine times as long on a CPU.
        projected = (positions @ wide.flatten(0, 1).T).view(2, *wide.shape[:2])
    return (projected * channels.unsqueeze(1)).sum(2).T


class Memory:
    """Outputs of convolutions, up to a limit beyond which all are forgotten.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self._left = limit
        self.full = limit == 0

    def output(
        self, func: Any, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int
    ) -> Output | None:
        """What `func` returned in a forward of so many samples; None where it is not, row by row, the convolution."""
        x = args[0] if args else kwargs["input"]
        bias, padding = (
            kwargs.get(name, args[i] if len(args) > i else None) for name, i in (("bias", 2), ("padding", 4))
        )
        # An output with a bias is not that of the bare convolution, and "same" may pad the input first. Where rows are
        # more than samples (frames of a video), they are not told apart here.
        if bias is not None or padding == "same" or result.dim() != CONVOLUTIONS[func] or len(result) != samples:
            return None
        if result.is_inference():  # could not tell that it was overwritten
            return None
        self._left -= result.nbytes
        # A network has tens of convolutions: where one takes a tenth of what may be kept, do not even begin.
        self.full |= self._left < 0 or result.nbytes > self._limit // 10
        if self.full:
            return None
        with torch.no_grad():
            return Output(result.detach(), result._version, _digest(_as_convolved(x)))


class Recorder(TorchFunctionMode):
    """Keeps the outputs of convolutions while a forward of `2 * pairs` inputs runs, weak ones first.

    Args:
        pairs: B.
        limit: bytes beyond which nothing is kept.
    """

    def __init__(self, pairs: int, limit: int) -> None:
        super().__init__()
        self._pairs = pairs
        self._memory = Memory(limit)
        self._calls: list[Output | None] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in CONVOLUTIONS:
            return func(*args, **(kwargs or {}))
        result = _in_parts(func, *args, **(kwargs or {}))
        if not self._memory.full:
            self._calls.append(self._memory.output(func, result, args, kwargs or {}, 2 * self._pairs))
        if self._memory.full:
            self._calls.clear()
        return result

    def recalled(self) -> Recalled | None:
        """What was kept; None if it was too much, or nothing."""
        return recalled(self._calls, self._calls, (0, self._pairs), self._pairs)


def recalled(
    weak: Sequence[Output | None], strong: Sequence[Output | None], first: tuple[int, int], pairs: int
) -> Recalled | None:
    """What is known of the forwards of `pairs` weak and strong samples.

    Args:
        weak: outputs of the convolutions of the forward that the weak views went through.
        strong: likewise; the same objects where it is the same forward.
        first: rows of the first weak and of the first strong sample.
        pairs: B.

    Returns:
        The outputs; None where there is none, or where the forwards made different calls.
    """
    if not weak or len(weak) != len(strong):
        return None
    calls = []
    for w, s in zip(weak, strong, strict=True):
        calls.append((w, s) if w is not None and s is not None and w.intact() and s.intact() else None)
    return Recalled(tuple(calls), first, pairs)


def _in_parts(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A convolution of a large batch, some samples at a time: oneDNN copies what it gets, and what it returns."""
    samples = max(1, len(input) * _PART_BYTES // max(1, input.nbytes))
    if input.dim() != CONVOLUTIONS[func] or samples >= len(input) or not input.is_contiguous():
        return func(input, *args, **kwargs)
    first = func(input[:samples], *args, **kwargs)
    result: Tensor = first.new_empty(len(input), *first.shape[1:])
    result[:samples] = first
    for start in range(samples, len(input), samples):
        result[start : start + samples] = func(input[start : start + samples], *args, **kwargs)
    return result


def _as_convolved(x: Tensor) -> Tensor:
    """The input in the dtype in which autocast computes."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.dtype == torch.float32 else x


def recall_bytes(engine: object, *, dropout: bool) -> int:
    """How much of an earlier forward is of use: nothing with chance in the forward, since the next is another one."""
    return 0 if dropout else getattr(engine, "recall_bytes", 0)


def take_statistics(forward: PerSampleForward, weak: Inputs, strong: Inputs, *, keep: int = 0) -> Recalled | None:
    """Records the joint statistics of all weak and strong inputs, by one forward without graph.

    Args:
        forward: its BatchNorm calls answer with these statistics from now on.
        weak: all weak views of a call.
        strong: all strong views.
        keep: bytes of outputs of convolutions that may be kept.

    Returns:
        The kept outputs, or None.

    Raises:
        InputShapeError: the views cannot be one batch.
    """
    if not concatenable(weak, strong):
        raise InputShapeError(
            "`weak` and `strong` differ in shape, so BatchNorm's joint statistics cannot be taken from one batch: pad"
            " both to one shape, or use `batchnorm='running'`."
        )
    recorder = Recorder(len(leaves(weak)[0]), keep)
    with torch.no_grad(), recorder:
        forward.output(concatenate(weak, strong), record=True)
    return recorder.recalled()
