"""Decides whether the unlabeled loss of a method may come out of the term's own pass.

The comparison computes the strong views' per-sample losses anyway. A method whose unlabeled loss is a weighted mean of
them need not run the strong views itself. The step is the same to rounding if the model computes in the comparison what
it computes in the method: this is tried, not assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist._consistency.independence import rounding
from gradconsist._consistency.probed import Probed
from gradconsist._consistency.settings import Settings
from gradconsist._forward.batchnorm import STRONG, BatchNormCalls, StatisticsMissingError, needs_statistics
from gradconsist._forward.functional_call import call_with, copied
from gradconsist._forward.isolation import one_comparison
from gradconsist._forward.per_sample import PerSampleForward
from gradconsist._forward.randomness import preserved_randomness
from gradconsist._forward.remembered import Memory, nothing_kept
from gradconsist._forward.sandbox import autocast_region, comparison_scope
from gradconsist._inputs.batch import check_inputs, leaves, map_leaves, take
from gradconsist._inputs.cross_entropy import find_logits
from gradconsist._inputs.parametrized import nothing_cached
from gradconsist._inputs.precision import wide
from gradconsist.errors import UnsupportedModuleError
from gradconsist.types import Inputs, UnlabeledLoss

_FEW = 2  # samples of the comparison's forward; the method's own has the whole batch, whose size may matter


def losses_obstacle(settings: Settings) -> str | None:
    """Says why a comparison cannot give the strong views' losses of a whole batch with their graph; None if it can."""
    device = next(settings.model.parameters()).device
    region = autocast_region(device)
    dtypes = {parameter.dtype for parameter in settings.model.parameters()} | ({region[1]} if region else set())
    if settings.max_pairs is not None:
        return f"`max_pairs={settings.max_pairs}` leaves pairs out, whose losses nobody computes"
    if settings.stop_gradient == "strong":
        return "`stop_gradient='strong'` computes the strong views without a graph"
    if not getattr(settings.engine, "gives_losses", False):
        return f"the engine {settings.engine!r} has no `gives_losses`, so it returns no losses"
    if settings.through_statistics and normalises_batch(settings):
        return "`through_statistics=True` differentiates the statistics, which are constants of these losses"
    if torch.float16 in dtypes:
        return "the step computes in float16, where the comparison scales its losses"
    return None


def sharing_obstacle(method: Any, settings: Settings, *, demanded: bool) -> str | None:
    """Says what forbids a shared pass, without running the model; None if nothing does.

    `demanded`: the user wants it with BatchNorm in batch mode, too.
    """
    if not hasattr(method, "sharing_obstacle"):
        return (
            f"`method` is a {type(method).__name__}, whose unlabeled loss the wrapper does not know (in a step of your"
            " own, call `with_losses` of the loss)"
        )
    obstacle: str | None = method.sharing_obstacle() or losses_obstacle(settings)
    if obstacle is not None:
        return obstacle
    if hasattr(method, "_orig_mod") or getattr(method, "_compiled_call_impl", None) is not None:
        # Inductor gives the labeled loss of such a step no graph (seen in torch 2.14).
        return "`method` is compiled (compile its model instead), and a shared step lets it run otherwise"
    if getattr(method.model, "_orig_mod", method.model) is not getattr(settings.model, "_orig_mod", settings.model):
        return "the loss compares another module than `method.model`"
    hooked = next((path for path, module in method.named_modules() if _has_hooks(module)), None)
    if hooked is not None:
        return f"{f'`method.{hooked}`' if hooked else '`method`'} has hooks, which would not see the strong views"
    if not settings.default_loss:
        return "the consistency loss has another `loss_fn` than the method, which uses cross-entropy"
    if settings.batchnorm == "observed":
        return "`batchnorm='observed'` needs the method's own forward of the strong views"
    if not demanded and normalises_batch(settings):
        return "a BatchNorm is in batch mode, whose statistics the comparison holds constant (`share=True` accepts it)"
    return None


def _has_hooks(module: nn.Module) -> bool:
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own)


def unlabeled_elsewhere(method: Any, settings: Settings) -> AbstractContextManager[UnlabeledLoss]:
    """Lets a method leave its unlabeled loss to the caller inside the block."""
    context: AbstractContextManager[UnlabeledLoss] = method.unlabeled_elsewhere(together=normalises_batch(settings))
    return context


def normalises_batch(settings: Settings) -> bool:
    """Tells whether a BatchNorm module takes its statistics from the batch, in the method or in the comparison."""
    return needs_statistics(settings.model, "batch" if settings.batchnorm == "batch" else "auto")


def difference(settings: Settings, probed: Probed, inputs: Inputs, *, demanded: bool) -> str | None:
    """Says in what the model computes something else in the method than in the comparison, by running it both ways.

    Returns None if both agree to rounding. `demanded`: other statistics of a BatchNorm are accepted, and with
    ``dropout="on"`` another draw.
    """
    inputs = check_inputs("strong", inputs)
    region = autocast_region(leaves(inputs)[0].device)
    # What a model computes may depend on attributes: a dropout's probability, a switch, a list of layers to skip.
    state = probed.state(settings.model, inputs)
    check = settings.batchnorm, settings.dropout, region, demanded, state.attributes
    fact = check, state.key
    if fact not in probed.differences:
        # Attributes may change at every step, so that earlier findings would pile up.
        probed.differences = {known: found for known, found in probed.differences.items() if known[0] == check}
        with one_comparison():
            probed.differences[fact] = _difference(settings, inputs, region, demanded=demanded)
    return probed.differences[fact]


def _difference(
    settings: Settings, inputs: Inputs, region: tuple[str, torch.dtype] | None, *, demanded: bool
) -> str | None:
    model, device, dropout = settings.model, leaves(inputs)[0].device, settings.dropout == "on"
    forward = PerSampleForward(
        model, settings.loss_fn, BatchNormCalls(settings.batchnorm), dropout=dropout, autocast=region
    )
    before, after = dict(model.named_buffers()), dict[str, Tensor]()
    given = map_leaves(torch.clone, inputs)  # the model may write into them
    named = given if isinstance(given, Mapping) else {}
    args = () if named else (given,) if isinstance(given, Tensor) else tuple(given)
    with torch.no_grad():
        try:
            # No cached casts, see `PerSampleForward`.
            cast = torch.autocast(*region, cache_enabled=False) if region else nullcontext()
            with preserved_randomness(device, None), nothing_kept(model), nothing_cached(), cast:
                memory = Memory(model)
                kept = memory.read()
                own = find_logits(call_with(model, copied(before), args, named, left=after))
                remembers = memory.changed(kept)
        except UnsupportedModuleError:
            if demanded and dropout:
                return None
            return "the model draws random numbers in train mode (dropout, say), with which the comparison does without"
        if demanded and normalises_batch(settings):
            return None  # statistics of the batch make both forwards differ, and the running ones move
        if remembers or any(not torch.equal(tensor, after[name]) for name, tensor in before.items()):
            kind = "attributes" if remembers else "buffers"
            return f"a forward of the model changes its {kind}, and a shared step has other forwards"
        try:
            with preserved_randomness(device, seed=0), comparison_scope(model, dropout=dropout):
                ours = find_logits(forward.output(take(inputs, slice(0, _FEW)), STRONG))
        except StatisticsMissingError:
            return None if demanded else "the model normalises over the batch, which the comparison does with constants"
    if own is None or ours is None:
        return "the model returns no logits that the default loss finds"
    tolerance = rounding(forward, [own])
    own, ours = wide(own[:_FEW]).log_softmax(1), wide(ours).log_softmax(1)
    # Entry by entry: beside a class that is masked by -1e4, no difference of another one would be large.
    other = not torch.allclose(own, ours, tolerance, tolerance)
    return "the model returns other logits in the comparison than in the method" if other else None
