"""What takes a step: optimizer, learning rate, SAM's two gradients, half precision; and the averaged model."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from gradconsist import StepOutput
from gradconsist.optim import SAM
from trainer.errors import OptionError
from trainer.runlog import Number

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# GradScaler starts at 2^16 and halves at each overflow. At 1 the loss itself overflows: waiting would train nothing.
_LEAST_SCALE = 1.0


def cosine_factor(step: int, steps: int) -> float:
    """`cos(7 pi k / 16 K)`: 1 at the start, 0.195 at the end, never 0."""
    return math.cos(7 * math.pi * step / (16 * steps))


def set_learning_rate(optimizer: Optimizer, lr: float, step: int, steps: int, warmup: int = 0) -> float:
    """Set the learning rate of step k from 0, about to be taken: a function of k alone.

    With W the warm-up, the factor of `lr` is `(k + 1) / W` in the first W steps, then the cosine of the steps after.
    """
    value = lr * ((step + 1) / warmup if step < warmup else cosine_factor(step - warmup, steps - warmup))
    for group in optimizer.param_groups:
        group["lr"] = value
    return value


def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float, adamw: bool = False) -> Optimizer:
    """SGD with Nesterov momentum 0.9, or AdamW, with weight decay on kernels only.

    A kernel is a parameter of two or more dimensions: names would miss the BatchNorm of a shortcut.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kernels, others = ([p for p in trained if (p.ndim > 1) == kernel] for kernel in (True, False))
    decays = ((kernels, weight_decay), (others, 0.0))
    groups = [{"params": own, "weight_decay": decay} for own, decay in decays if own]
    return AdamW(groups, lr=lr) if adamw else SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def same_step_twice(method: nn.Module, sam: SAM, gradient: Callable[[], StepOutput]) -> StepOutput:
    """Take SAM's two gradients of one step, and leave the second in `.grad` with the weights back in place.

    Both passes start from the same state of the method (step counters, memories, generators, BatchNorm's running
    statistics) and the same random numbers, so that the second differs by the weights alone. What the method
    remembers afterwards is from the first pass, at the weights that the step starts from.
    """
    before = _state(method)
    out = gradient()
    after = _state(method)
    sam.first_step()
    try:
        _load(method, before)
        gradient()
    finally:
        sam.restore()
        _load(method, after)
    return out


def _state(method: nn.Module) -> tuple[dict[str, Any], torch.Tensor, list[torch.Tensor]]:
    """A copy of everything but the trained weights, and the random state."""
    trained = {name for name, p in method.named_parameters(remove_duplicate=False) if p.requires_grad}
    kept = {name: value for name, value in method.state_dict().items() if name not in trained}
    return copy.deepcopy(kept), torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _load(method: nn.Module, state: tuple[dict[str, Any], torch.Tensor, list[torch.Tensor]]) -> None:
    kept, cpu, cuda = state
    method.load_state_dict(kept, strict=False)
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda)


def check_half(amp: str, device: torch.device) -> None:
    """Refuse a device that cannot compute in the half type: torch may raise, or warn and go on in float32."""
    if amp == "off":
        return
    wanted, why = AMP_TYPES[amp], "torch goes on in float32"
    try:
        kernel = torch.zeros(1, 1, 1, 1, device=device, requires_grad=True)
        with warnings.catch_warnings(), torch.autocast(device.type, dtype=wanted):
            warnings.simplefilter("ignore")
            out = torch.nn.functional.conv2d(torch.zeros(1, 1, 1, 1, device=device), kernel)
        out.sum().backward()
        if out.dtype == wanted:
            return
    except RuntimeError as error:
        why = str(error).splitlines()[0]
    instead = "--amp bf16 or --amp off" if amp == "fp16" else "--amp off"
    raise OptionError(f"--amp {amp} does not work on {device} with torch {torch.__version__} ({why}): give {instead}.")


def update_scale(scaler: torch.amp.GradScaler) -> dict[str, Number]:
    """Adapt the loss scale of fp16, and say what it was; an overflow halves it, and its step was skipped."""
    if not scaler.is_enabled():
        return {}
    scale = scaler.get_scale()
    scaler.update()
    skipped = scaler.get_scale() < scale
    if skipped and scale < _LEAST_SCALE:
        raise FloatingPointError(f"the gradient is not finite at a loss scale of {scale:g}")
    return {"loss_scale": scale, "skipped": float(skipped)}


class AveragedModel:
    """`average <- d * average + (1 - d) * model` after every step; buffers of whole numbers are copied.

    BatchNorm's running statistics are averaged, too, for they belong to the weights that they were taken with. Copied
    instead, as the FixMatch reference does, they are those of the last weights: where channel means move, which the
    gradient consistency lets them do and BatchNorm does not notice, an averaged model with them is worth nothing
    (docs/guides/batchnorm-and-dropout.md).

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
