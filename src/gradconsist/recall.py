"""The forward that takes BatchNorm's joint statistics, and what of it serves the forwards that follow.

BatchNorm's joint statistics need a forward of all pairs before the first chunk. The chunks then run the same layers
with the same parameters on the same inputs: what a convolution returned is known, and only its graph is missing. It is
kept up to a limit, since it grows with the number of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradconsist.batch import concatenable, concatenate, leaves
from gradconsist.errors import InputShapeError
from gradconsist.forward import PerSampleForward
from gradconsist.types import Inputs

CONVOLUTIONS = {getattr(torch, f"conv{kind}{dims}d"): 2 + dims for kind in ("", "_transpose") for dims in (1, 2, 3)}


@dataclass(frozen=True)
class Recalled:
    """Outputs of all convolutions of one forward over weak and strong inputs, in the order of the calls.

    Attributes:
        outputs: for each call its output [2 B, ...], weak rows first; None where it cannot be told by rows.
        pairs: B.
        rows: the pairs that are meant, [n]; None for all.
    """

    outputs: tuple[Tensor | None, ...]
    pairs: int
    rows: Tensor | None = None

    def take(self, index: Tensor) -> Recalled:
        """The same for the pairs `index`."""
        return replace(self, rows=index if self.rows is None else self.rows[index])

    def interleaved(self) -> Tensor:
        """Rows of the samples w0, s0, w1, s1, ..."""
        device = next((output.device for output in self.outputs if output is not None), None)
        rows = torch.arange(self.pairs, device=device) if self.rows is None else self.rows
        return torch.stack([rows, rows + self.pairs], 1).flatten()


class Recorder(TorchFunctionMode):
    """Keeps the outputs of convolutions while a forward of `2 * pairs` inputs runs.

    Args:
        pairs: B.
        limit: bytes beyond which nothing is kept.
    """

    def __init__(self, pairs: int, limit: int) -> None:
        super().__init__()
        self._pairs = pairs
        self._left = limit
        self._outputs: list[Tensor | None] | None = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in CONVOLUTIONS and self._outputs is not None:
            bias = (kwargs or {}).get("bias", args[2] if len(args) > 2 else None)
            self._keep(result, known=bias is None and result.dim() == CONVOLUTIONS[func])
        return result

    def _keep(self, output: Tensor, *, known: bool) -> None:
        assert self._outputs is not None
        # Where rows are more than samples (frames of a video), they are not told apart here. An output with a bias is
        # not that of the bare convolution.
        known = known and output.shape[0] == 2 * self._pairs
        self._outputs.append(output if known else None)
        self._left -= output.nbytes if known else 0
        if self._left < 0:
            self._outputs = None

    def recalled(self) -> Recalled | None:
        """What was kept; None if it was too much, or nothing."""
        if not self._outputs:
            return None
        return Recalled(tuple(self._outputs), self._pairs)


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
