"""Sets up and restores random state, modes and flags around every forward of the user's model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradconsist._forward.batchnorm import WEAK, BatchNormCalls
from gradconsist._forward.isolation import as_written
from gradconsist._forward.per_sample import PerSampleForward
from gradconsist._forward.randomness import preserved_randomness
from gradconsist._refusals.failures import model_failure
from gradconsist._refusals.limits import explain
from gradconsist.errors import GradConsistError
from gradconsist.types import Inputs


def autocast_region(device: torch.device) -> tuple[str, torch.dtype] | None:
    """Returns device type and dtype of the caller's autocast region, or None."""
    kind = device.type
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


@contextmanager
def our_rules(
    model: nn.Module,
    device: torch.device,
    views: Mapping[str, Inputs],
    *,
    seed: int | None = None,
    dropout: bool = False,
) -> Iterator[None]:
    """Sets random state, modes and flags for `PerSampleForward` inside the block, and explains errors of torch.

    The views have names for the messages. Without a seed the block may draw no random number. `dropout`: random layers
    stay on.
    """
    try:
        with (
            preserved_randomness(device, seed),
            comparison_scope(model, dropout=dropout),
            # Only the forwards run under autocast; derivatives and sums need full precision.
            torch.autocast(device.type, enabled=False),
        ):
            yield
    except Exception as error:
        refusal = _refusal(error, model, device, views)
        if refusal is None:
            raise
        raise refusal from error


def _refusal(
    error: Exception, model: nn.Module, device: torch.device, views: Mapping[str, Inputs]
) -> GradConsistError | None:
    if isinstance(error, GradConsistError | torch.OutOfMemoryError):
        return None
    limit = explain(error) if isinstance(error, RuntimeError) else None
    return limit or model_failure(error, model, views, partial(_works, model, device))


def _works(model: nn.Module, device: torch.device, inputs: Inputs) -> bool | None:
    """Tells whether the model by itself runs on `inputs`; None if something else keeps it from running."""
    forward = PerSampleForward(model, lambda output, target: target, BatchNormCalls("auto"))
    try:
        with preserved_randomness(device, seed=0), comparison_scope(model, dropout=False), torch.no_grad():
            forward.output(inputs, WEAK, record=True)
    except (GradConsistError, torch.OutOfMemoryError):
        return None  # refused for another reason, or only too large
    except Exception:
        return False
    return True


@contextmanager
def comparison_scope(model: nn.Module, *, dropout: bool) -> Iterator[None]:
    """Sets flags of torch and of `model` for the comparison, and restores them afterwards.

    A layer counts as random if it is in train mode and has no parameters, buffers or children. It has nothing to learn
    or remember, so train mode can only add chance to it (dropout, stochastic depth, noise). Such layers are put in eval
    mode, and so are recurrent layers, which may apply dropout themselves.

    Attributes that the user's hooks assign during a derivative are restored too: under vmap they would hold tensors
    that are invalid outside. What a forward assigns is restored after each forward (`remembered`).
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(as_written())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused forms cannot be differentiated twice
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_native_recurrence())
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module, _ in attributes:
                if module.training and not dropout and (_is_bare(module) or isinstance(module, nn.RNNBase)):
                    module.training = False
            yield
        finally:
            for module, before in attributes:
                vars(module).clear()
                vars(module).update(before)
            torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def _native_recurrence() -> Iterator[None]:
    """Uses torch's own recurrent kernels; those of mkldnn and cuDNN cannot be differentiated twice."""
    # Not `mkldnn.flags(...)`: that context also writes float32 precision flags, which it warns about or leaves changed.
    mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
        yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch._C._set_cudnn_enabled(cudnn)


def _is_bare(module: nn.Module) -> bool:
    return not (module._parameters or module._buffers or module._modules)
