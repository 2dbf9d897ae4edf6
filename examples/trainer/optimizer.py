"""What takes a step: the optimizer, its learning rate, SAM's two gradients, and half precision with its loss scale."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
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
    kernels = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
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
