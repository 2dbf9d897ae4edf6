"""The mode that computes for the simulated device, refuses what CUDA refuses, and counts."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .kernels import REPLACED

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
HERE, ROOT = str(Path(__file__).parent), Path(__file__).resolve().parents[3]

#: Operators that make the host wait for a number.
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive,
    aten.unique_dim, aten.equal, aten.bincount,
}  # fmt: skip
#: Operators that only allocate, or change what a tensor says about its memory: torch's own do that.
NATIVE = {
    aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.set_, aten.resize_,
    aten.record_stream, aten.is_pinned, aten._pin_memory, aten.pin_memory,
}  # fmt: skip
NESTED = (tuple, list, dict)
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
TRANSFERS = {aten._to_copy, aten.copy_, aten._copy_from}
#: Beside the pointwise operators: where CUDA takes a CPU tensor of no dimension.
TAKES_SCALAR = {aten.fill_, aten.masked_fill, aten.masked_fill_, aten.index_fill, aten.index_fill_, aten.index_put_}


class SimulatedGPU(TorchDispatchMode):
    """Runs on the CPU what is asked of the simulated device.

    Args:
        float64: whether the device has float64, which MPS and some XPUs lack.

    Attributes:
        kernels: how often each operator ran on the device; some operators launch several kernels.
        reads: how often the host waited for a number, by operator, file and line.
        copies: copies between host and device, by direction, file and line.
    """

    def __init__(self, *, float64: bool = True) -> None:
        super().__init__()
        self.float64 = float64
        self.reset()

    def __enter__(self) -> SimulatedGPU:
        # CUDA's fused attention has no counterpart on the CPU. Attention is written out instead, as on an old GPU.
        self._attention = _attention()
        _attention(False, False, False)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        _attention(*self._attention)
        super().__exit__(*error)

    def reset(self) -> None:
        """Sets the counts to zero."""
        self.kernels: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = _leaves(kwargs.values(), _leaves(args, []))
        here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda]
        generator, wanted = kwargs.get("generator"), kwargs.get("device")
        if not here and (wanted is None or torch.device(wanted).type != "cuda"):
            _one_device(func, generator, CPU)
            return func(*args, **kwargs)
        if _is_native(func):
            return func(*args, **kwargs)
        operator = func.overloadpacket
        target = CUDA if wanted is None else torch.device(wanted)
        if operator in TRANSFERS:
            target = self._transfer(operator, args, kwargs, target)
        else:
            self._check(func, operator, args, leaves)
            _one_device(func, generator, target)
        name = str(operator).removeprefix("aten.")
        masks = operator in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None)
        if here and (operator in READS or masks or (name == "repeat_interleave" and kwargs.get("output_size") is None)):
            self.reads[f"{name} at {place()}"] += 1
        self.kernels[name] += 1
        wide = kwargs.get("dtype") == torch.float64 and target.type == "cuda"
        if not self.float64 and (wide or any(tensor.dtype == torch.float64 for tensor in here)):
            raise TypeError(f"this device does not support float64 ({name} at {place()})")
        aliases: dict[int, Tensor] = {}  # a tensor that comes twice has one alias
        given: dict[int, Tensor] = {}

        def to_host(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                found = aliases.get(id(leaf))
                if found is None:
                    found = aliases[id(leaf)] = alias(leaf)
                    given[id(found)] = leaf
                return found
            if isinstance(leaf, torch.device):
                return CPU
            return None if isinstance(leaf, torch.Generator) and leaf.device.type == "cuda" else leaf

        def to_device(found: Any) -> Any:
            if not isinstance(found, Tensor):
                return found
            if id(found) in given:  # changed in place
                return given[id(found)]
            return on_device(found) if target.type == "cuda" else found

        run = REPLACED.get(operator, func)
        host_args, host_kwargs = _map(to_host, args), _map(to_host, kwargs)
        if target.type == "cuda" and torch.Tag.nondeterministic_seeded in func.tags:
            result = _drawn(run, host_args, host_kwargs, generator)
        else:
            result = run(*host_args, **host_kwargs)
        return _map(to_device, result)

    def _transfer(self, operator: Any, args: Any, kwargs: Any, target: torch.device) -> torch.device:
        """Counts a copy between host and device, and returns where it goes."""
        source = args[1] if operator is aten.copy_ else args[0]
        if operator is aten.copy_:
            target = args[0].device
        elif kwargs.get("device") is None:
            target = source.device
        if source.device.type != target.type:
            way = "to the host" if target.type == "cpu" else "to the device"
            where = place()
            self.copies[f"{way} at {where}"] += 1
            if target.type == "cpu" and not kwargs.get("non_blocking"):
                self.reads[f"copy to the host at {where}"] += 1
        return target

    def _check(self, func: Any, operator: Any, args: Any, leaves: list[Any]) -> None:
        """Raises where CPU and CUDA tensors may not meet."""
        scalars = torch.Tag.pointwise in func.tags or operator in TAKES_SCALAR or func.__name__.startswith("_foreach")
        indices = {id(index) for index in args[1] if index is not None} if operator in INDEXING else set()
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.device.type != "cpu" or (leaf.dim() == 0 and scalars):
                continue
            if id(leaf) not in indices:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
                    f" ({func}: {tuple(leaf.shape)} is on the CPU, at {place()})"
                )
            self.copies[f"to the device (an index) at {place()}"] += 1  # allowed; torch copies it


def _attention(*enabled: bool) -> tuple[bool, ...]:
    """Which fused kernels of attention may be used; sets it first if told to."""
    backend = torch.backends.cuda
    switches = backend.enable_flash_sdp, backend.enable_mem_efficient_sdp, backend.enable_cudnn_sdp
    for switch, on in zip(switches, enabled, strict=False):
        switch(on)
    return backend.flash_sdp_enabled(), backend.mem_efficient_sdp_enabled(), backend.cudnn_sdp_enabled()


def place() -> str:
    """The two innermost lines of the project that are running, or "autograd" in the engine's own thread."""
    frame, found = sys._getframe(2), []
    while frame is not None and len(found) < 2:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and "site-packages" not in file and not file.startswith(HERE):
            found.append(f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "autograd"


def alias(tensor: Tensor) -> Tensor:
    """A CPU tensor on the memory of a CUDA tensor."""
    storage = tensor.untyped_storage()
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())  # type: ignore[attr-defined]
    return torch.empty(0, dtype=tensor.dtype).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def on_device(tensor: Tensor) -> Tensor:
    """A CUDA tensor with the values of a CPU tensor, and its strides where they cover memory of their own."""
    dense = all(step > 0 or size <= 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    if dense:
        found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
    else:
        found = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
    if tensor.numel():
        alias(found).copy_(tensor)
    return found


def _one_device(func: Any, generator: torch.Generator | None, target: torch.device) -> None:
    if generator is not None and generator.device.type != target.type:
        raise RuntimeError(
            f"Expected a '{target.type}' device type for generator but found '{generator.device.type}' ({func})"
        )


@functools.cache
def _is_native(func: Any) -> bool:
    """Whether torch's own operator does without kernels: it allocates, makes or changes a view, or is a collective."""
    schema = func._schema
    changes = any(each.alias_info is not None and each.alias_info.is_write for each in schema.arguments)
    view = not changes and any(each.alias_info is not None for each in schema.returns)
    return view or func.overloadpacket in NATIVE or torch.Tag.inplace_view in func.tags or func.namespace == "c10d"


def _leaves(values: Any, found: list[Any]) -> list[Any]:
    """Everything in the tuples, lists and dicts of an operator's arguments, behind what was found before."""
    for each in values:
        if type(each) in NESTED:
            _leaves(each.values() if type(each) is dict else each, found)
        else:
            found.append(each)
    return found


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Applies a function to everything in the tuples, lists and dicts of an operator's arguments or results."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([change(each) if type(each) not in NESTED else _map(change, each) for each in value])
    if kind is dict:
        return {key: _map(change, each) for key, each in value.items()}
    return change(value)


def _drawn(run: Callable[..., Any], args: Any, kwargs: Any, generator: torch.Generator | None) -> Any:
    """Runs a random operator from the state of the device's generator, which moves on; the host's does not."""
    source = generator or torch.cuda.default_generators[0]
    before = torch.get_rng_state()
    torch.default_generator.manual_seed((source.initial_seed() * 1_000_003 + source.get_offset()) % 2**63)
    source.set_offset(source.get_offset() + 4)
    try:
        return run(*args, **kwargs)
    finally:
        torch.set_rng_state(before)
