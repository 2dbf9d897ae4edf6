"""Counts what a step asks of the host: kernels to launch, and reads to wait for, by line of the source.

A kernel is an operator of ATen that computes: views and allocations are left out, and a multi-tensor operator counts
once. A read moves numbers to Python, or needs them to know a shape; a GPU's host then waits for all earlier work.
Counts are the same on every device, except where the library itself treats devices differently.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_FREE = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::set_", "aten::resize_")
_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2")
_INDEXED = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")
_SOURCE = "/src/gradconsist/"
_PASSES_ON = ("__torch_function__", "call")  # frames of modes and wrappers, which stand around all other lines
_ELSEWHERE = "outside the library"


class HostWork(TorchDispatchMode):
    """Counts operators inside the block.

    Attributes:
        kernels: kernels by line and operator, as in ("engines/ghost/gram.py:49", "mul").
        reads: reads, likewise.
        operations: floating point operations of convolutions and matrix products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.reads: Counter[tuple[str, str]] = Counter()
        self.operations = 0
        self._free: dict[Any, bool] = {}
        self._stack = ExitStack()

    def __enter__(self) -> HostWork:
        # An operator in a backward belongs to the line that ran its forward, which the anomaly mode notes.
        self._stack.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        masks = name in _INDEXED and any(part is not None and part.dtype == torch.bool for part in args[1])
        place = _line(), name.removeprefix("aten::")
        if name in _READS or masks:
            self.reads[place] += 1
        if name not in _READS and not self._costs_nothing(func, name):
            self.kernels[place] += 1
        result = func(*args, **(kwargs or {}))
        if name in ("aten::convolution", "aten::convolution_backward"):
            self.operations += _of_convolution(name, args)
        elif func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result

    def _costs_nothing(self, func: Any, name: str) -> bool:
        if func not in self._free:
            returned = func._schema.returns
            # Multi-tensor operators in place return nothing, and so do checks without a kernel.
            tensors = any("Tensor" in str(each.type) for each in returned) or name.startswith("aten::_foreach")
            view = bool(returned) and all(each.alias_info and not each.alias_info.is_write for each in returned)
            self._free[func] = view or not tensors or not name.startswith("aten::") or name.startswith(_FREE)
        return self._free[func]


def _of_convolution(name: str, args: Any) -> int:
    """Returns the operations of a convolution or of its gradients; torch's own count ignores groups."""
    if name == "aten::convolution":
        x, w, transposed, wanted = args[0], args[1], args[6], 1
        sizes = zip(x.shape[2:], w.shape[2:], *(args[place] for place in (3, 4, 5)), strict=True)
        out = [(size + 2 * pad - d * (k - 1) - 1) // step + 1 for size, k, step, pad, d in sizes]
        positions = x.numel() if transposed else x.shape[0] * w.shape[0] * math.prod(out)
    else:
        gy, x, w, transposed, wanted = args[0], args[1], args[2], args[7], sum(args[10][:2])
        positions = x.numel() if transposed else gy.numel()
    return int(2 * wanted * positions * math.prod(w.shape[1:]))


def by_line(counts: Counter[tuple[str, str]]) -> dict[str, int]:
    """Returns counts by line, the largest first."""
    lines: Counter[str] = Counter()
    for (line, _), count in counts.items():
        lines[line] += count
    return dict(lines.most_common())


def _line() -> str:
    """Returns the innermost line of the library that runs, or that made the node of the backward that runs."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if _SOURCE in name and frame.f_code.co_name not in _PASSES_ON:
            return _short(name, frame.f_lineno)
        if frame.f_code.co_name == "_engine_run_backward":
            return _made(torch._C._current_autograd_node())
        frame = frame.f_back
    return _ELSEWHERE


def _made(node: Any) -> str:
    """Returns the line of the forward behind a node, which may be the derivative of a derivative."""
    kind = type(node).name(node)
    while "parent_" in node.metadata:
        node = node.metadata["parent_"]
    # Each is '  File "path", line 3, in function'.
    places = [line.split('"') for text in node.metadata.get("traceback_", []) for line in text.split("\n")]
    own = [place for place in places if len(place) > 2 and _SOURCE in place[1]]
    own = [place for place in own if place[2].split()[-1] not in _PASSES_ON]
    where = _short(own[-1][1], int(own[-1][2].split()[2].strip(","))) if own else _ELSEWHERE
    return f"{where}, {kind}"


def _short(file: str, line: int) -> str:
    return f"{file.split(_SOURCE)[1]}:{line}"
