"""Refuses models for which a number would be wrong, or torch would fail far from the cause."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from gradconsist._inputs.batch import is_wrapper
from gradconsist.errors import ConfigError, UnsupportedModuleError

# By qualified name, because most of these classes are slow, or not everywhere possible, to import.
_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": (
        "pass the inner model (`ddp.module`) to the loss and wrap the step instead: DDP(GGCRWrapper(method, loss))"
    ),
    "torch.nn.parallel.data_parallel.DataParallel": (
        "pass the inner model (`.module`); for several devices use DistributedDataParallel over the wrapper"
    ),
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "FSDP does not support double backward: use DistributedDataParallel over the wrapper"
    ),
    "torch.jit._script.ScriptModule": "a scripted or traced module cannot be taken apart: pass the Python module",
}
# Layers of other libraries without a second derivative, by their qualified names.
_ONCE = {
    "torchvision.ops.deform_conv.DeformConv2d",
    "mmcv.ops.deform_conv.DeformConv2d",
    "mmcv.ops.modulated_deform_conv.ModulatedDeformConv2d",
}


def check_model(model: object) -> None:
    """Refuses a model whose gradients cannot be compared exactly."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` is of type {type(model).__name__}, not a torch.nn.Module: pass the module itself.")
    for path, module in model.named_modules():
        where = f"`model.{path}`" if path else "`model`"
        kinds = {f"{kind.__module__}.{kind.__qualname__}": kind.__name__ for kind in type(module).__mro__}
        wrapper = next((name for name in kinds if name in _WRAPPERS), None)
        if wrapper is not None:
            raise UnsupportedModuleError(f"{where} is a {kinds[wrapper]}: {_WRAPPERS[wrapper]}.")
        if kinds.keys() & _ONCE and any(parameter.requires_grad for parameter in module.parameters()):
            raise UnsupportedModuleError(
                f"{where} is a {type(module).__name__}, a deformable convolution, which has no second derivative: use"
                " Conv2d, or freeze it and every layer before it."
            )
        composed = _composed(module)
        if "replicate" in composed:
            raise UnsupportedModuleError(
                f"{where} was replicated in place (`replicate`), which counts every forward of the model as a step:"
                " leave the model unchanged and wrap the step instead: DDP(GGCRWrapper(method, loss))."
            )
        sharded = any(getattr(p, "_fsdp_flattened", False) for p in module._parameters.values())
        if sharded or "fully_shard" in composed or type(module).__name__.startswith("FSDP"):
            raise UnsupportedModuleError(
                f"{where} is sharded by FSDP, which does not support double backward: use DistributedDataParallel over"
                " the wrapper."
            )
        _check_module(where, module)


def _composed(module: nn.Module) -> Collection[str]:
    """Returns the names of the functions of torch.distributed that changed `module` in place."""
    contract: Any = sys.modules.get("torch.distributed._composable.contract")
    return (contract._get_registry(module) or ()) if hasattr(contract, "_get_registry") else ()


def _check_module(where: str, module: nn.Module) -> None:
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if torch.nn.parameter.is_lazy(parameter):
            raise UnsupportedModuleError(f"{where} has uninitialized (lazy) parameters: run one forward first.")
        kind = type(parameter.data)
        if kind.__name__ == "DTensor" or (parameter.requires_grad and is_wrapper(parameter)):
            raise UnsupportedModuleError(
                f"{where} has the parameter {name!r} of type {kind.__name__}, which is not an ordinary dense tensor:"
                " use a model with plain parameters (for several processes: DistributedDataParallel over the wrapper)."
            )
        if parameter.requires_grad and parameter.is_inference():
            raise UnsupportedModuleError(
                f"{where} has the parameter {name!r} made under torch.inference_mode(), which cannot be"
                " differentiated: build or copy the model outside of it, or freeze the parameter."
            )
    if isinstance(module, nn.EmbeddingBag):
        raise UnsupportedModuleError(
            f"{where} is an EmbeddingBag, which has no second derivative in torch: use Embedding and a sum or mean over"
            " the tokens."
        )
    if isinstance(module, nn.CrossMapLRN2d):
        raise UnsupportedModuleError(
            f"{where} is a CrossMapLRN2d, whose first derivative is wrong in torch and which has no second derivative:"
            " use LocalResponseNorm."
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise UnsupportedModuleError(
            f"{where} is an Embedding(max_norm=...), which writes into its weights in the forward: set it to None."
        )
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        raise UnsupportedModuleError(
            f"{where} is an Embedding(scale_grad_by_freq=True), which scales a sample's gradient by the rest of the"
            " batch: set it to False."
        )
    if isinstance(module, nn.SyncBatchNorm) and module.training and process_count() > 1:
        raise UnsupportedModuleError(
            f"{where} is a SyncBatchNorm in train mode among {process_count()} processes, whose joint statistics this"
            " library does not gather: put it in eval mode, or use `batchnorm='running'` with BatchNorm2d or GroupNorm."
        )


def process_count() -> int:
    """Returns W, the number of processes in the default group; 1 if there is no group."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1
