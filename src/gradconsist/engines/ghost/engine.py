"""The engine: one batched forward, gradients of layer outputs, and inner products layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradconsist._forward.batchnorm import STRONG, WEAK
from gradconsist._inputs.batch import leaves, rebuilt
from gradconsist._inputs.options import check_choice
from gradconsist._inputs.precision import wide_dtype
from gradconsist.engines.base import Problem
from gradconsist.engines.conditions import SamplesDiffer, in_groups
from gradconsist.engines.ghost.gram import interleaved
from gradconsist.engines.ghost.layer_gradients import Seen, see
from gradconsist.engines.ghost.parts import FORMS, Form, Parts, chosen, joined
from gradconsist.engines.ghost.registered import culprit
from gradconsist.engines.ghost.rules import EmbeddingWeight, LinearWeight, Rule
from gradconsist.engines.ghost.sketch import route, sketches
from gradconsist.engines.loop import LoopEngine, refused_by_vmap
from gradconsist.errors import GradConsistError
from gradconsist.types import GradProducts, Inputs

logger = logging.getLogger("gradconsist")


@dataclass
class _Known:
    """Results about one model, kept between calls.

    Attributes:
        looped: paths of modules that run sample by sample, each with the reason.
        told: whether the warning about chunks that run sample by sample was given.
    """

    looped: dict[str, str] = field(default_factory=dict)
    told: bool = False


@dataclass(frozen=True)
class GhostEngine:
    """Computes inner products of per-sample gradients layer by layer, from layer inputs and output gradients.

    For a layer y_t = W a_t at positions t, the gradient of one sample's loss is G = sum_t d_t a_t^T with d_t the
    gradient for y_t. The engine runs both views of a chunk as one batch and asks autograd for all d, but for no
    gradient of a parameter. It computes ||G_w||^2, ||G_s||^2 and ⟨G_w, G_s⟩ from a and d, in the cheaper of two forms
    per layer:

        gradient    G itself, one layer at a time: T p c multiplications per sample
        gram        sum over t, t' of ⟨a_t, a_t'⟩ ⟨d_t, d_t'⟩: T^2 (c + p)

    Both are exact. For parameters without a rule (bare and parametrised weights, scales and shifts, custom recurrent
    layers) the per-sample gradient is formed, which is exact too. The gradients of all uses of a parameter are summed.

    The forward runs under `torch.func.vmap`, which keeps track of the samples' dimension. A condition that depends
    on data is answered where all samples agree; where they differ, each group of equal answers runs as its own batch.
    If vmap refuses a module inside the model, that module runs sample by sample and the rest as before; the logger
    "gradconsist" warns once. If vmap refuses the whole model, use `LoopEngine`; ``engine="auto"`` switches to it by
    itself.

    Args:
        form: "auto" chooses by a count of multiplications and passes over memory, the same in every run. "gradient"
            and "gram" force one form wherever a layer has both. In float32, "gradient" replaces "gram" where positions
            cancel so far that accuracy would suffer.
    """

    projects: ClassVar[bool] = True
    gives_losses: ClassVar[bool] = True
    most_pairs: ClassVar[int] = 256
    form: Form = "auto"
    _models: WeakKeyDictionary[Any, _Known] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy starts without results, which are kept per model.
        return GhostEngine, (self.form,)

    def products(self, problem: Problem) -> GradProducts:
        """See `Engine.products`."""
        try:
            return self._products(problem)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error, GradConsistError):
                raise
            refusal = refused_by_vmap(problem, error)
            path = culprit(problem.model, error)
            looped = self._known(problem).looped
            if path is None or path in looped:
                raise refusal from error
            looped[path] = str(error)
        try:
            products = self.products(problem)
        except BaseException:
            del looped[path]
            raise
        logger.warning(
            "%r runs sample by sample from now on, since torch refused it in one batch: %s", path, looped[path]
        )
        return products

    def looped(self, model: nn.Module) -> Mapping[str, str]:
        """Returns the paths of modules of `model` that run sample by sample, each with torch's error under vmap."""
        return dict(self._models[model].looped) if model in self._models else {}

    def _known(self, problem: Problem) -> _Known:
        return _Known() if problem.model is None else self._models.setdefault(problem.model, _Known())

    def _products(self, problem: Problem, *, together: bool = True) -> GradProducts:
        """Computes the products in one batch, or in one batch per group of samples that answer all conditions alike.

        `together`: both views may be in one batch.
        """
        try:
            return self._in_one_batch(problem, together=together)
        except SamplesDiffer as difference:
            answers = difference.answers
        apart = len(answers) == len(problem.target)  # the views ran one after the other
        pairs: list[Any] = answers if apart else list(zip(answers[::2], answers[1::2], strict=True))
        if len(pairs) >= 8 and 2 * len(set(pairs)) > len(pairs):  # batches of one pair take longer than the loop
            self._tell_of_loop(problem)
            return LoopEngine().products(problem)
        alike = [False] * len(pairs) if apart else [weak == strong for weak, strong in pairs]
        run = lambda rows: self._products(problem.take(rows), together=alike[int(rows[0])]).present()  # noqa: E731
        return GradProducts(*in_groups(run, pairs))

    def _tell_of_loop(self, problem: Problem) -> None:
        known = self._known(problem)
        if not known.told:
            logger.warning(
                "some chunks run sample by sample, since almost every sample takes another branch in the model:"
                " let it depend on a batch's shape only, or compute with the tensor instead of `.item()` or float()."
            )
        known.told = True

    def _in_one_batch(self, problem: Problem, *, together: bool) -> GradProducts:
        together &= problem.graph_weak == problem.graph_strong and _stackable(problem.weak, problem.strong)
        if together:
            seen = self._see_both(problem)
            with torch.set_grad_enabled(problem.graph_weak):
                return _total(problem, self._grams(problem, seen), seen.losses[STRONG::2])
        weak, strong = (self._see_one(problem, view) for view in (WEAK, STRONG))
        with torch.set_grad_enabled(problem.graph_weak or problem.graph_strong):
            return _total(problem, self._grams_of_two(problem, weak, strong), strong.losses)

    def _see_both(self, problem: Problem) -> Seen:
        """Runs both views as one batch."""
        samples, target = _both_views(problem.weak, problem.strong), problem.target.repeat_interleave(2, 0)
        view = torch.tensor([WEAK, STRONG], device=target.device).repeat(len(problem.target))
        return see(problem, samples, target, view, problem.graph_weak, self._known(problem).looped)

    def _see_one(self, problem: Problem, view: int) -> Seen:
        samples, graph = ((problem.weak, problem.graph_weak), (problem.strong, problem.graph_strong))[view]
        views = torch.full([len(problem.target)], view, device=problem.target.device)
        return see(problem, samples, problem.target, views, graph, self._known(problem).looped)

    def routes(self, problem: Problem) -> dict[str, str]:
        """Describes how the inner products of each compared parameter are computed.

        Args:
            problem: the pairs.

        Returns:
            A description per parameter name; empty if the losses do not depend on the parameter.
        """
        together = _stackable(problem.weak, problem.strong)
        try:
            seen = self._see_both(problem) if together else self._see_one(replace(problem, graph_weak=False), WEAK)
        except SamplesDiffer:  # one sample agrees with itself
            together = False
            seen = self._see_one(replace(problem.take(torch.tensor([0])), graph_weak=False), WEAK)
        exact = _exact(problem)
        return {
            name: self._route(name, seen, paired=together) if name in exact else route(name, seen, problem.projection)
            for name in problem.parameters
        }

    def _route(self, name: str, seen: Seen, *, paired: bool) -> str:
        uses, rest = seen.of(name), ["per-sample gradient"] if name in seen.rows else []
        single = _single(name, seen, self.form)
        form = "gradient"
        if single is not None and paired:
            form = chosen(*single, self.form)
        parts = list(dict.fromkeys([f"{use.rule.name}, {form} form" for use, _ in uses] + rest))
        count = len(uses) + len(rest)
        return " + ".join(parts) + (f" ({count} uses as one)" if count > 1 else "")

    def _grams(self, problem: Problem, seen: Seen) -> list[Tensor]:
        """Computes M of all parameters, or of their sketches, from interleaved samples, in parts that add up."""
        parts = Parts(self.form)
        for sketch in (
            () if problem.projection is None else sketches(seen, problem.parameters, problem.projection).values()
        ):
            parts.add_gradients(sketch)
        for name in _exact(problem):
            single = _single(name, seen, self.form)
            if single is not None:
                parts.add(*single)
            else:
                parts.add_gradients(seen.gradient(name))
        return parts.grams()

    def _grams_of_two(self, problem: Problem, weak: Seen, strong: Seen) -> list[Tensor]:
        """Computes the same from views that ran in separate forwards."""
        parts = Parts(self.form)
        for name in _exact(problem):
            self._add_of_two(parts, name, weak, strong, len(problem.target))
        if problem.projection is not None:
            mine, other = (sketches(seen, problem.parameters, problem.projection) for seen in (weak, strong))
            for name in {**mine, **other}:
                parts.add_two_gradients(mine.get(name), other.get(name))
        return parts.grams()

    def _add_of_two(self, parts: Parts, name: str, weak: Seen, strong: Seen, samples: int) -> None:
        """Adds one parameter from views that ran in separate forwards."""
        one, other = (_single(name, seen, self.form) for seen in (weak, strong))
        if one is not None and other is not None and chosen(*one, self.form) == "gram":
            (rule, x, d_weak), (same, y, d_strong) = one, other
            if rule == same and _shape(x) == _shape(y):
                # Outputs have each sample's maps or positions folded into the rows, but pairs are pairs of samples.
                d_weak, d_strong = (d.unflatten(0, (samples, -1)) for d in (d_weak, d_strong))
                both = None if x is None or y is None else interleaved(x, y)
                parts.add(rule, both, interleaved(d_weak, d_strong).flatten(0, 1))
                return
        parts.add_two_gradients(weak.gradient(name), strong.gradient(name))


def _exact(problem: Problem) -> list[str]:
    """Returns the names of parameters that are compared without projection."""
    projection = problem.projection
    if projection is None:
        return list(problem.parameters)
    return [name for name, p in problem.parameters.items() if not (projection.flat or projection.shrinks(p.shape))]


def _single(name: str, seen: Seen, form: Form) -> tuple[Rule, Tensor | None, Tensor] | None:
    """Returns rule, input and output gradient if a parameter has one use, or several that are joined; else None.

    Rows of a table of embeddings become one-hot rows as long as the table, so that long texts do with less memory, and
    fewer multiplications, in a table per sample.
    """
    uses = seen.of(name)
    if name in seen.rows or not uses:
        return None
    if len(uses) == 1:
        return uses[0][0].rule, uses[0][0].input, uses[0][1]
    products = [(use.rule, use.input, d) for use, d in uses if isinstance(use.rule, LinearWeight | EmbeddingWeight)]
    if len(products) < len(uses) or (form != "gram" and _tables_are_smaller(products)):
        return None
    return (LinearWeight(), *joined(products))


def _tables_are_smaller(uses: Sequence[tuple[LinearWeight | EmbeddingWeight, Tensor | None, Tensor]]) -> bool:
    """Tells whether the weight is a table of embeddings with fewer columns than both views have positions."""
    columns = [rule.shape[1] for rule, _, _ in uses if isinstance(rule, EmbeddingWeight)]
    positions = sum(d[..., 0].numel() // len(x) for _, x, d in uses if x is not None)
    return bool(columns) and 2 * positions > columns[0]


def _total(problem: Problem, found: list[Tensor], strong_losses: Tensor) -> GradProducts:
    parameter = next(iter(problem.parameters.values()))
    losses = strong_losses if problem.with_losses else None
    if not found:
        zeros = parameter.new_zeros(len(problem.target), dtype=wide_dtype(parameter))
        return GradProducts(zeros, zeros.clone(), zeros.clone(), losses)
    total = torch.stack(found).sum(0)
    return GradProducts(total[:, 0, 0], total[:, 1, 1], total[:, 0, 1], losses)


def _stackable(weak: Inputs, strong: Inputs) -> bool:
    """Tells whether weak and strong samples fit into one batch."""
    pairs = zip(leaves(weak), leaves(strong), strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _both_views(weak: Inputs, strong: Inputs) -> Inputs:
    mixed = [interleaved(a, b) for a, b in zip(leaves(weak), leaves(strong), strict=True)]
    return mixed[0] if isinstance(weak, Tensor) else rebuilt(weak, mixed)
