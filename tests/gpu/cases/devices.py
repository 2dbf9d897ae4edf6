"""Moving nested inputs to a device, and leaving the simulated one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from support.oracle import tree_map


def move(tree: Any, device: str) -> Any:
    """The tree with its tensors on the device."""
    return tree_map(lambda x: x.to(device), tree)


def to_cpu(tree: Any) -> Any:
    """The tree with its tensors on the CPU, detached."""
    return tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, tree)


def computing_on(device: str) -> contextlib.AbstractContextManager[Any]:
    """Takes the simulated device away for what runs on the CPU, which is then as fast as ever."""
    return contextlib.nullcontext() if device == "cuda" else _disable_current_modes()


def on_both(call: Callable[[str], Any]) -> tuple[Any, Any]:
    """What the call returns for the CPU and for CUDA, both on the CPU."""
    with computing_on("cpu"):
        expected = call("cpu")
    return to_cpu(expected), to_cpu(call("cuda"))
