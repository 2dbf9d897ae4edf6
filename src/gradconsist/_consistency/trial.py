"""Checks a model by running it, on the first call and again when its modules or modes have changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gradconsist._consistency.advice import (
    warn_of_conditions,
    warn_of_equal_views,
    warn_of_functions,
    warn_of_probabilities,
    warn_of_unreached,
)
from gradconsist._consistency.custom_functions import check_custom_functions, custom_functions
from gradconsist._consistency.independence import independent, samples_together
from gradconsist._consistency.probed import Probed, State
from gradconsist._forward.batchnorm import STRONG, WEAK
from gradconsist._forward.per_sample import PerSampleForward
from gradconsist._forward.randomness import preserved_randomness
from gradconsist._forward.sandbox import comparison_scope
from gradconsist._forward.sparse import sparse_parameters
from gradconsist._inputs.batch import concatenable, concatenate, leaves, take
from gradconsist._inputs.cross_entropy import check_several, cross_entropy, find_logits
from gradconsist._inputs.pairs import Pairs
from gradconsist._refusals.graphs import check_first_derivative, keys_of, leaves_of, used_otherwise
from gradconsist.engines.base import Engine, Problem
from gradconsist.errors import (
    InputShapeError,
    InputValueError,
    LossContractError,
    NonFiniteError,
)

_FEW = 3  # pairs that are tried where many were tried before, with inputs of another length, say


def probe_model(
    forward: PerSampleForward, pairs: Pairs, index: Tensor, probed: Probed, compared: Collection[str] = ()
) -> State:
    """Tries the model on a pair of the call unless it passed before, and checks the targets on every call.

    Pairs outside `index` may hold anything and are not used. `compared` names the parameters whose gradients are
    compared. Passed checks are added to `probed`. Returns the model's state in this call.
    """
    state = probed.state(forward.model, pairs.weak, pairs.strong)
    forward_fact, functions_fact = ("forward", *state.key), ("functions", *state.key)
    differentiated = torch.is_grad_enabled() and not probed.report_only  # `measure` needs no second derivative
    outgrown = probed.outgrown(state.attributes, samples_together(2 * len(index)))
    probed.due |= outgrown
    if outgrown:
        probed.passed.discard(functions_fact)  # a second derivative may be wrong for other data
    if probed.due:
        probed.passed.discard(forward_fact)  # now already, so that a refusal holds on the next call, too
    wanted = ({forward_fact} | ({functions_fact} if differentiated else set())) - probed.passed
    if wanted:
        index = index if probed.due else index[:_FEW]
        weak, strong = take(pairs.weak, index), take(pairs.strong, index)
        taken = replace(pairs, weak=weak, strong=strong, target=pairs.target[index])
        # With separate random numbers, so that a first call draws the same masks as any other call.
        with preserved_randomness(pairs.device, seed=0):
            if forward_fact in wanted:
                with comparison_scope(forward.model, dropout=False):
                    conclusive = _try_forward(forward, taken, probed)
                _try_derivative(forward, taken, probed, compared)
                probed.passed |= {forward_fact} if conclusive else set()
                probed.due = probed.due and not conclusive
            if functions_fact in wanted:
                _try_functions(forward, _one_loss(forward, taken, {}), lambda: _one_loss(forward, taken, {}), probed)
                probed.passed.add(functions_fact)
    _check_classes(forward, pairs.target, probed.classes)
    return state


def probe_engine(
    state: State,
    engine: Engine,
    problem: Problem,
    terms: Iterable[Callable[[], Tensor]],
    expected: Sequence[Tensor],
    probed: Probed,
) -> int:
    """Tries engine and derivative on a pair unless they passed before; returns the bytes that a pair's graph keeps.

    The first of `terms` with a graph decides: in float16 a gradient may overflow, and such a term shows nothing. It
    must be differentiable in `expected`.
    """
    # The engine is part of the key, because the automatic one may have changed.
    derivative = (f"derivative by {engine!r}", *state.key)
    sketched = problem.projection and (problem.projection.kind, problem.projection.dim)
    memory = (derivative, problem.graph_weak, problem.graph_strong, sketched)
    differentiated = problem.graph_weak or problem.graph_strong  # `measure` has nothing to differentiate
    if memory in probed.kept and (derivative in probed.passed or not differentiated):
        return probed.kept[memory]
    with preserved_randomness(problem.target.device, seed=0):  # a trial must not use up random numbers of the call
        for term in terms:
            with suppress(NonFiniteError):  # of this pair or of others, which the call itself reports
                value, probed.kept[memory] = _weighed(term, problem)
                if value.requires_grad:
                    # If this fails, it must fail here with a clear error, not in the user's backward.
                    torch.autograd.grad(value.sum(), expected, allow_unused=True, retain_graph=True)
                    probed.passed.add(derivative)
                if value.requires_grad or not differentiated:
                    break
    return probed.kept.get(memory, 0)


def _weighed(term: Callable[[], Tensor], problem: Problem) -> tuple[Tensor, int]:
    """Computes a term, and the bytes that its graph keeps besides the model's own tensors, which all pairs share."""
    kept: dict[int, int] = {}
    models_own = () if problem.model is None else (*problem.model.parameters(), *problem.model.buffers())
    shared = {tensor.untyped_storage().data_ptr() for tensor in models_own}

    def weigh(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
            value = term()
        return value, sum(size for place, size in kept.items() if place not in shared)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
    # An engine that uses torch.func.grad, under which torch refuses such hooks, stores gradients of the compared
    # parameters: two per pair, their cotangents, and intermediates of each. This is an upper estimate.
    return term(), 8 * sum(parameter.nbytes for parameter in problem.parameters.values())


def _try_forward(forward: PerSampleForward, pairs: Pairs, probed: Probed) -> bool:
    """Checks that samples are independent; returns False if the call cannot show it (equal samples, NaN, or chance)."""
    # Dropout is always off here, because the same sample must give the same numbers twice.
    quiet = PerSampleForward(forward.model, forward.loss_fn, forward.batchnorm, autocast=forward.autocast)
    parts = [(pairs.weak, pairs.target), (pairs.strong, pairs.target)]
    if concatenable(pairs.weak, pairs.strong):
        parts = [(concatenate(pairs.weak, pairs.strong), torch.cat([pairs.target, pairs.target]))]
    with torch.no_grad():
        output = quiet.output(take(pairs.weak, slice(0, 1)), WEAK)
        logits = find_logits(output)
        probed.classes = logits.shape[1] if logits is not None and logits.dim() == 2 else None
        _check_classes(forward, pairs.target, probed.classes)
        if logits is not None and probed.classes and forward.loss_fn is cross_entropy and "softmax" not in probed.told:
            probed.told |= {"softmax"} if warn_of_probabilities(logits) else set()
        tell = lambda: warn_of_conditions() if probed.once("conditions") else None  # noqa: E731
        conclusive = [independent(quiet, *part, chance=forward.dropout, tell=tell) for part in parts]
    return all(conclusive)


def _equal_views(pairs: Pairs) -> bool:
    views = zip(leaves(pairs.weak), leaves(pairs.strong), strict=True)
    return all(weak.shape == strong.shape and torch.equal(weak, strong) for weak, strong in views)


def _one_loss(forward: PerSampleForward, pairs: Pairs, parameters: Mapping[str, Tensor]) -> Tensor:
    """Computes the loss of one sample, with its graph."""
    with torch.enable_grad():
        return forward.losses(take(pairs.weak, slice(0, 1)), pairs.target[:1], parameters, WEAK)


def _try_derivative(forward: PerSampleForward, pairs: Pairs, probed: Probed, compared: Collection[str]) -> None:
    """Checks that the loss of one sample has a graph to some compared parameter, and only to replaced parameters."""
    own = {name: parameter for name, parameter in forward.model.named_parameters() if parameter.requires_grad}
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in own.items()}
    loss = _one_loss(forward, pairs, copies)
    check_first_derivative(loss, own)
    embedded = {name: copies[name] for name in sparse_parameters(forward.model) & set(copies)}
    probed.dense |= used_otherwise(loss, embedded, "EmbeddingBackward0")
    if not loss.requires_grad:
        raise LossContractError(
            "the per-sample loss has no graph: `loss_fn` or the model detaches its result (`.detach()`, `.item()`,"
            " `no_grad`, NumPy). Return a tensor that depends on the model's parameters."
        )
    reached = leaves_of(loss)
    unreached = [name for name in compared if id(copies[name]) not in reached]
    if compared and len(unreached) == len(compared):
        raise LossContractError(
            f"the loss depends on none of the {len(compared)} compared parameters ({unreached[0]!r}, ...), so every"
            " gradient is zero: something after them cuts the graph (`.detach()`, `no_grad`, a frozen part), or"
            " `encoder` names a part that this forward does not use."
        )
    if unreached and probed.once("unreached"):
        warn_of_unreached(unreached, compared)
    if compared and _equal_views(pairs) and probed.once("equal views"):
        warn_of_equal_views()


def probe_functions(forward: PerSampleForward, pairs: Pairs, index: Tensor, probed: Probed, keys: set[str]) -> None:
    """Tests custom Functions that no earlier sample ran, since samples may take different branches of a model.

    `keys` are those of all Functions in the graph of the pairs `index`.
    """
    if keys <= probed.met or probed.report_only:
        return
    with preserved_randomness(pairs.device, seed=0):
        for row in index.tolist():
            one, target = slice(row, row + 1), pairs.target[row : row + 1]
            for view, inputs in ((WEAK, pairs.weak), (STRONG, pairs.strong)):
                again = partial(forward.losses, take(inputs, one), target, {}, view)
                with torch.enable_grad():
                    _try_functions(forward, again(), again, probed)
    probed.met |= keys


def _try_functions(forward: PerSampleForward, loss: Tensor, again: Callable[[], Tensor], probed: Probed) -> None:
    """Checks that the custom autograd Functions in the loss of one sample have the right second derivative."""
    found = check_custom_functions(loss, forward.model, again)
    probed.met |= {key for function in custom_functions(loss)[0] for key in keys_of(function)}
    if found and probed.once("functions"):
        warn_of_functions(found)
    probed.functions |= found


def _check_classes(forward: PerSampleForward, target: Tensor, classes: int | None) -> None:
    if forward.loss_fn is not cross_entropy or classes is None:
        return
    check_several(classes)
    if target.dim() == 1 and int(target.max()) >= classes:
        raise InputValueError(
            f"`target` has class {int(target.max())}, the model has {classes} classes (0 to {classes - 1})."
        )
    if target.dim() == 2 and target.shape[1] != classes:
        raise InputShapeError(f"`target` has {target.shape[1]} columns, the model has {classes} classes.")
