"""Shields a comparison from other threads, transforms, compilers and checkpoints.

While the model runs, a comparison replaces its parameters and buffers and sets flags of torch for the whole process.
Two comparisons at once would see each other's tensors and flags.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.utils import checkpoint

from gradconsist._inputs.parametrized import nothing_cached
from gradconsist.errors import GradModeError

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Generators of the non-reentrant form; newer releases of torch use the second name (seen in 2.15).
_CHECKPOINTS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")

_lock = threading.Lock()
_here = threading.local()


@contextmanager
def one_comparison() -> Iterator[None]:
    """Lets one comparison per process run at a time; other threads wait, and a call from inside one is refused."""
    if getattr(_here, "compares", False):
        raise GradModeError(
            "GradientConsistencyLoss was called inside a comparison (by `loss_fn`, a hook or the model's own forward),"
            " where it would need a third derivative: call it outside, next to the other one, and add the two losses."
        )
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        raise GradModeError(
            "GradientConsistencyLoss was called inside a transform (torch.func.vmap, grad, jvp or forward-mode"
            " differentiation), which cannot follow it: call it outside, and use `backward()` or torch.autograd.grad."
        )
    with _lock:
        _here.compares = True
        try:
            yield
        finally:
            _here.compares = False


def uncompiled(function: _Function) -> _Function:
    """Wraps `function` so that torch.compile leaves it alone when compiled code calls it."""
    skipped = _disable_dynamo(function)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
            return skipped(*args, **kwargs)
        return function(*args, **kwargs)

    return run  # type: ignore[return-value]


@contextmanager
def as_written() -> Iterator[None]:
    """Runs compiled functions inside the model as plain Python, and checkpointed functions without recomputation.

    Compiled code cannot be differentiated twice. A checkpoint would run its function again in the backward, where our
    rules (constant BatchNorm statistics, dropout off) no longer hold.
    """
    kept = {name: getattr(checkpoint, name) for name in _CHECKPOINTS if hasattr(checkpoint, name)}
    # If torch._dynamo was never imported, nothing has been compiled, and importing it would take seconds.
    dynamo = "torch._dynamo" in sys.modules
    with nothing_cached(), torch.compiler.set_stance("force_eager") if dynamo else nullcontext():
        try:
            for name in kept:
                setattr(checkpoint, name, _keep)
            yield
        finally:
            for name, generator in kept.items():
                setattr(checkpoint, name, generator)


def _keep(*_: Any, **__: Any) -> Iterator[None]:
    """Replaces torch's generator around a checkpointed function, which saves and restores what it computes."""
    yield
