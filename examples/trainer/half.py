"""Half precision: whether the device computes in it, and the loss scale of fp16."""

from __future__ import annotations

import warnings

import torch

from trainer.errors import OptionError
from trainer.runlog import Number

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# GradScaler starts at 2^16 and halves at each overflow. At 1 the loss itself overflows: waiting would train nothing.
_LEAST_SCALE = 1.0


def check_half_type(amp: str, device: torch.device) -> None:
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
