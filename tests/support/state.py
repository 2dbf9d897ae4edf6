"""Snapshots of everything that a call of the loss must leave as it was."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Functions that a library might be tempted to patch while it runs.
_FUNCTIONS = {
    "F": (F, ("batch_norm", "dropout", "dropout2d", "scaled_dot_product_attention", "relu", "instance_norm")),
    "torch": (torch, ("batch_norm", "dropout", "is_grad_enabled", "_weight_norm", "bernoulli")),
}


def digest(tensor: Tensor | None) -> str:
    """Bits, shape and dtype of a tensor."""
    if tensor is None:
        return "none"
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(raw).hexdigest()[:16]}"


def of_model(model: nn.Module) -> dict[str, Any]:
    """Flags, parameters, gradients, buffers, hooks and attributes of a model and its submodules."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}: training"] = module.training
        state[f"{name}: class"] = (type(module), type(module).forward, type(module).__call__)
        state[f"{name}: attributes"] = sorted(vars(module))
        for key, value in vars(module).items():
            if "_hooks" in key and isinstance(value, dict):
                state[f"{name}: {key}"] = [id(hook) for hook in value.values()]
        for key, parameter in module._parameters.items():
            state[f"{name}.{key}: identity"] = (id(parameter), type(parameter))
            if parameter is not None:
                state[f"{name}.{key}: requires_grad"] = parameter.requires_grad
                state[f"{name}.{key}: value"] = digest(parameter)
                state[f"{name}.{key}: grad"] = (id(parameter.grad), digest(parameter.grad))
                state[f"{name}.{key}: tensor hooks"] = len(parameter._backward_hooks or ())
        for key, buffer in module._buffers.items():
            state[f"{name}.{key}: buffer"] = (id(buffer), digest(buffer))
    state["state_dict"] = {key: digest(value) for key, value in model.state_dict().items()}
    return state


def of_process() -> dict[str, Any]:
    """Random state, global flags of torch and the functions that could have been patched."""
    state: dict[str, Any] = {
        "random state": digest(torch.random.get_rng_state()),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "mkldnn": torch.backends.mkldnn.enabled,
        "precision": precision(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "module hooks": [
            len(getattr(nn.modules.module, key))
            for key in dir(nn.modules.module)
            if key.startswith("_global_") and "hooks" in key and isinstance(getattr(nn.modules.module, key), dict)
        ],
    }
    with contextlib.suppress(AttributeError):
        state["function modes"] = torch._C._len_torch_function_stack()
        state["dispatch modes"] = torch._C._len_torch_dispatch_stack()
    for prefix, (namespace, names) in _FUNCTIONS.items():
        for name in names:
            state[f"{prefix}.{name}"] = id(getattr(namespace, name))
    return state


def precision() -> dict[str, Any]:
    """Every flag of precision that this torch has."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found = {
        "matmul": torch.get_float32_matmul_precision(),
        "half sums": cuda.allow_fp16_reduced_precision_reduction,
        "bfloat16 sums": cuda.allow_bf16_reduced_precision_reduction,
    }
    for name, place in (("matmul", cuda), ("convolutions", cudnn)):
        with contextlib.suppress(RuntimeError):  # newer torch refuses the old name once the new one was used
            found[f"TF32 in {name}"] = place.allow_tf32
    for path in ("", "cuda.matmul.", "cudnn.", "cudnn.conv.", "cudnn.rnn.", "mkldnn.", "mkldnn.matmul.", "mkldnn.rnn."):
        owner: Any = torch.backends
        for part in path.split(".")[:-1]:
            owner = getattr(owner, part, None)
        found[f"{path}fp32_precision"] = getattr(owner, "fp32_precision", None)
    return found


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Of the process and of a model."""
    return {**of_process(), **of_model(model)}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The entries that changed, appeared or went."""
    return [key for key in {**before, **after} if before.get(key, "absent") != after.get(key, "absent")]
