"""What holds around every forward that this library makes of a user's model."""

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
    """Device type and dtype of the caller's autocast region, or None."""
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
    """Random state, modes and flags as the rules of `forward` need them, and errors of torch explained.

    Args:
        model: the user's model.
        device: where it is.
        views: what the model runs on, by the name that a message should use.
        seed: of the block's random numbers; None if it may draw none.
        dropout: whether random layers stay on.

    Yields:
        None.

    Raises:
        UnsupportedModuleError: torch cannot differentiate the model; the message names the remedy.
        InputTypeError: the model's forward does not take such views.
        ModelError: the model or its loss failed with an error of torch's or Python's own.
    """
    try:
        with (
            preserved_randomness(device, seed),
            comparison_scope(model, dropout=dropout),
            # Everything but the forwards runs in full precision: derivatives and sums are not for autocast.
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


def _works(model: nn.Module, device: torch.device, inputs: Inputs) -> bool:
    """Whether the model alone runs on `inputs`."""
    forward = PerSampleForward(model, lambda output, target: target, BatchNormCalls("auto"))
    try:
        with preserved_randomness(device, seed=0), comparison_scope(model, dropout=False), torch.no_grad():
            forward.output(inputs, WEAK, record=True)
    except (GradConsistError, torch.OutOfMemoryError):
        return True  # refused for another reason, or only too large
    except Exception:
        return False
    return True


@contextmanager
def comparison_scope(model: nn.Module, *, dropout: bool) -> Iterator[None]:
    """Flags of torch and of `model` as the comparison needs them; as they were, on the way out.

    Random layers are told from others by what they are: a module in train mode without parameters, buffers and
    children has nothing to learn or to remember, so what training changes in it is chance (dropout, stochastic depth,
    noise). Those go to eval mode. Recurrent layers hold dropout of their own.

    What a forward assigns to attributes (features that it keeps, counters, the weight that an old weight_norm hook
    sets) is put back too: under vmap it would be a tensor that is dead outside. Objects that it changes in place, and
    what the user's own hooks collect, are the user's.
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
    """Torch's own recurrent kernels: neither those of mkldnn nor those of cuDNN can be differentiated twice."""
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
