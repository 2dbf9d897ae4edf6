"""Explains errors of torch about what it cannot differentiate, and says what to do instead."""

from __future__ import annotations

from gradconsist.errors import UnsupportedModuleError

# Part of torch's message, and what to do.
_LIMITS = (
    ("called random operation while in randomness error mode", "the model draws random numbers: `dropout='on'`"),
    ("Checkpointing is not compatible", "reentrant checkpointing: pass use_reentrant=False to torch.utils.checkpoint"),
    ("saved tensor hooks", "checkpointing or saved-tensor hooks inside the model: `engine='loop'`"),
    ("does not currently support double backward", "a compiled part of the model: use the uncompiled module"),
    ("trying to differentiate twice a function that was marked with @once_differentiable", "a custom autograd.Function"
     " without a second derivative: write its backward with differentiable operations"),
    ("double backwards on", "an operation of torchvision without a second derivative: replace it (a deformable"
     " convolution by Conv2d), or freeze it and everything before it"),
    ("modified by an inplace operation", "a layer overwrites a tensor that the derivative needs: pass inplace=False, or"
     " write it without in-place operations"),
    ("derivative for", "an operation without a second derivative: replace it, or leave its parameters out"),
    ("Double backward", "an operation without a second derivative: replace it, or leave its parameters out"),
    ("Batching rule not implemented", "`engine='loop'`"),
    ("Either your tensor may have escaped", "checkpointing inside the model, which vmap cannot run: `engine='loop'`"),
    ("torch.utils.checkpoint: ", "a checkpointed part that computes something else the second time: call it without"
     " checkpointing, or with torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"),
    ("Inference tensors cannot be saved", "the model keeps a tensor made under torch.inference_mode(): make it outside,"
     " or register a clone of it as a buffer"),
)  # fmt: skip


def explain(error: RuntimeError) -> UnsupportedModuleError | None:
    """Returns an error that says what to do if torch's `error` means it cannot differentiate this model; else None."""
    message = str(error)
    for needle, remedy in _LIMITS:
        if needle in message:
            return UnsupportedModuleError(f"torch cannot do this here; remedy: {remedy}. Torch said: {message}")
    return None
