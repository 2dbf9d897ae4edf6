"""What goes on around a comparison and must not reach into it: other threads, transforms, compilers, checkpoints.

A comparison puts other tensors in the place of the model's parameters and buffers while the model runs, and sets flags
of torch that hold for the whole process. Two at once would see each other's.
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

from gradconsist.errors import GradModeError

_Function = TypeVar("_Function", bound=Callable[..., Any])

# The non-reentrant form; the second name is that of newer releases (seen in 2.15).
_CHECKPOINTS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")

_lock = threading.Lock()
_here = threading.local()


@contextmanager
def one_comparison() -> Iterator[None]:
    """Lets one comparison of the process run at a time; another thread's waits.

    Yields:
        None.

    Raises:
        GradModeError: the call comes from inside a comparison, or from inside a transform.
    """
    if getattr(_here, "compares", False):
        raise GradModeError(
            "GradientConsistencyLoss was called inside a comparison (by `loss_fn`, a hook or the model's own forward),"
            " where it would need a third derivative: call it beside the other one and add the two losses."
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
    """`function`, which torch.compile leaves alone where it is called by a function that is compiled."""
    skipped = _disable_dynamo(function)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
            return skipped(*args, **kwargs)
        return function(*args, **kwargs)

    return run  # type: ignore[return-value]


@contextmanager
def as_written() -> Iterator[None]:
    """Compiled functions inside the model run as Python, and checkpointed ones keep what they compute.

    Compiled code cannot be differentiated twice. A checkpoint would compute its part again in the backward, where our
    rules (constant BatchNorm statistics, dropout off) no longer hold.
    """
    kept = {name: getattr(checkpoint, name) for name in _CHECKPOINTS if hasattr(checkpoint, name)}
    # Where torch._dynamo was never imported, nothing has been compiled, and the import would take seconds.
    dynamo = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if dynamo else nullcontext():
        try:
            for name in kept:
                setattr(checkpoint, name, _keep)
            yield
        finally:
            for name, generator in kept.items():
                setattr(checkpoint, name, generator)


def _keep(*_: Any, **__: Any) -> Iterator[None]:
    """In place of the generator around a checkpointed function, which runs it once before the call and once after."""
    yield
