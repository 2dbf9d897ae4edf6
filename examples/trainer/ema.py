"""The averaged model: an exponential moving average of parameters and of BatchNorm's running statistics.

The statistics belong to the weights that they were taken with. Copied instead, as the FixMatch reference does, they are
those of the last weights: where channel means move, which the gradient consistency lets them do and BatchNorm does not
notice, an averaged model with them is worth nothing (docs/guides/batchnorm-and-dropout.md).
"""

from __future__ import annotations

import copy
from itertools import compress

import torch
from torch import Tensor, nn


class AveragedModel:
    """`average <- d * average + (1 - d) * model` after every step; buffers of whole numbers are copied.

    The average lives in its own module: the trained weights are never swapped in place.

    A decay d of 0 follows the model exactly. The warm-up uses `min(d, (1 + k) / (10 + k))` at step k, so that a short
    run forgets its initial weights. `model` is the averaged copy, in eval mode, without gradients.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup, self.updates = decay, warmup, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards `model`."""
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        averaged, live = _tensors(self.model), _tensors(model)
        real = [tensor.is_floating_point() for tensor in averaged]
        torch._foreach_lerp_(list(compress(averaged, real)), list(compress(live, real)), 1 - decay)
        for mine, theirs, averages in zip(averaged, live, real, strict=True):
            if not averages:
                mine.copy_(theirs)
        self.updates += 1

    def state_dict(self) -> dict[str, object]:
        """The averaged model and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.updates = int(state["updates"])  # type: ignore[call-overload]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(parameter.data for parameter in model.parameters()), *model.buffers()]
