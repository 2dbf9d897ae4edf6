"""Computes per-sample gradients of a whole chunk at once, with `torch.func.vmap` of `torch.func.grad`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.overrides import TorchFunctionMode

from gradconsist._forward.batchnorm import STRONG, WEAK
from gradconsist._forward.randomness import preserved_randomness
from gradconsist._forward.remembered import attributes
from gradconsist._inputs.batch import constants, leaves, rebuilt, take
from gradconsist._refusals.graphs import check_batched, check_scripts
from gradconsist.engines.base import Problem, inner
from gradconsist.engines.conditions import READS, Conditions, SamplesDiffer, in_groups
from gradconsist.engines.loop import refused_by_vmap
from gradconsist.errors import GradConsistError, UnsupportedModuleError
from gradconsist.types import GradProducts, Inputs


@dataclass(frozen=True)
class VmapEngine:
    """Computes vectorised per-sample gradients and stores them, so a chunk of n pairs holds 2 n copies of E.

    Conditions that depend on data are answered where all samples agree, and split the batch where they differ. Torch
    refuses operators without a batching rule, shapes that depend on data and in-place writes into buffers; use the loop
    engine for such models.
    """

    projects: ClassVar[bool] = True
    gives_losses: ClassVar[bool] = True
    most_pairs: ClassVar[int] = 16  # more gain nothing on a CPU (benchmarks/cost/step_cost.py)
    _looked_at: WeakKeyDictionary[nn.Module, set[Hashable]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return VmapEngine, ()  # a copy starts without the list of checked models

    def products(self, problem: Problem) -> GradProducts:
        """See `Engine.products`."""
        graph, model = problem.graph_weak or problem.graph_strong, problem.model
        # With other constants or switches the model may run other code.
        called = (constants(problem.weak), () if model is None else attributes(model).switches)
        if graph and (model is None or called not in self._looked_at.get(model, ())):
            _refuse_scripts(problem, problem.weak, problem.target, WEAK)
        try:
            _, *weak = _gradients(problem, problem.weak, problem.target, WEAK, problem.graph_weak)
            losses, *strong = _gradients(problem, problem.strong, problem.target, STRONG, problem.graph_strong)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error, GradConsistError):
                raise
            raise refused_by_vmap(problem, error) from error
        check_batched([*weak, *strong])
        if graph and model is not None:
            self._looked_at.setdefault(model, set()).add(called)
        if problem.projection is not None:
            weak, strong = problem.projection.sketches(weak), problem.projection.sketches(strong)
        products = GradProducts(inner(weak, weak, keep=1), inner(strong, strong, keep=1), inner(weak, strong, keep=1))
        return products._replace(losses=losses) if problem.with_losses else products


_ONCE: dict[Any, str] = {
    Tensor.register_hook: "registers a gradient hook on a tensor in its forward",
    Tensor.grad_fn.__get__: "registers a hook on a node of the graph (`grad_fn`), or looks at it",  # type: ignore[union-attr]
    Tensor.data.__get__: "reads `.data` of a tensor instead of calling `.detach()`",  # type: ignore[attr-defined]
}


class _Calls(TorchFunctionMode):
    """Answers conditions, and refuses what torch follows in the first derivative only: gradient hooks, and ``.data``.

    Under vmap ``requires_grad`` is False for every tensor, so a hook registered under ``if h.requires_grad`` would be
    missed.

    Args:
        conditions: replacements that answer conditions; empty to leave them to torch.

    Attributes:
        read: whether the model has read a tensor's value.
    """

    def __init__(self, conditions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._conditions = conditions
        self.read = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.requires_grad.__get__ and args[0].is_floating_point():  # type: ignore[attr-defined]
            return True
        if func in _ONCE:
            raise UnsupportedModuleError(
                f"the model {_ONCE[func]}, which vmap follows in the first derivative only: use `engine='loop'` or"
                " 'auto'."
            )
        self.read |= func in READS
        return self._conditions.get(func, func)(*args, **(kwargs or {}))


def _refuse_scripts(problem: Problem, inputs: Inputs, target: Tensor, view: int) -> None:
    """Refuses scripted functions, found in the graph of one sample outside vmap."""
    one = slice(0, 1)
    with preserved_randomness(problem.target.device, seed=0), torch.enable_grad():
        for _ in range(2):  # the first run of a script is only profiled
            loss = problem.losses(take(inputs, one), target[one], view=view)
    check_scripts(loss)


def _gradients(problem: Problem, inputs: Inputs, target: Tensor, view: int, graph: bool) -> list[Tensor]:
    """Computes the losses [n] of all samples and their gradients, [n, *parameter shape] each."""
    is_tensor = isinstance(inputs, Tensor)
    modes: list[_Calls] = []

    def loss(parameters: Mapping[str, Tensor], target: Tensor, *sample: Tensor) -> Tensor:
        batched = [leaf.unsqueeze(0) for leaf in sample]
        one: Inputs = batched[0] if is_tensor else rebuilt(inputs, batched)
        # A group that runs again draws other random numbers, which would favour some answers.
        modes.append(_Calls({} if problem.random else Conditions(target).replacements))
        with modes[-1]:
            return problem.losses(one, target.unsqueeze(0), parameters, view).squeeze(0)

    columns = leaves(inputs)
    per_sample = vmap(
        grad_and_value(loss),
        in_dims=(None, 0, *[0] * len(columns)),
        randomness="different" if problem.random else "error",
    )
    try:
        # Under no_grad the inner `grad` still works, but its result has no graph, as wanted for a constant view.
        with torch.set_grad_enabled(graph):
            gradients, losses = per_sample(dict(problem.parameters), target, *columns)
        if graph and any(mode.read for mode in modes):  # other samples may have taken another branch of the model
            _refuse_scripts(problem, inputs, target, view)
        return [losses, *gradients.values()]
    except SamplesDiffer as difference:
        answers = difference.answers
    return in_groups(lambda rows: _gradients(problem, take(inputs, rows), target[rows], view, graph), answers)
