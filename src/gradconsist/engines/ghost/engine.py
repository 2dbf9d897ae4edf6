"""The engine: one batched forward, gradients of layer outputs, and inner products layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradconsist._forward.batchnorm import STRONG, WEAK
from gradconsist._forward.randomness import preserved_randomness
from gradconsist._inputs.batch import constants, leaves, rebuilt
from gradconsist._inputs.options import check_choice
from gradconsist._inputs.precision import wide_dtype
from gradconsist.engines.base import Problem
from gradconsist.engines.ghost.gram import pair_gram
from gradconsist.engines.ghost.layer_gradients import Seen, see
from gradconsist.engines.ghost.registered import culprit
from gradconsist.engines.ghost.rules import FORMS, Form, LinearWeight, Rule, chosen, joined, products
from gradconsist.engines.ghost.sketch import route, sketches
from gradconsist.engines.loop import refused_by_vmap
from gradconsist.errors import GradConsistError
from gradconsist.types import GradProducts, Inputs

logger = logging.getLogger("gradconsist")

# What the graph of a chunk may keep, and pairs at most. Fixed numbers and not timings, so that a resumed run adds up in
# the same order and stays bitwise equal. On CPUs larger chunks gain little (benchmarks/cost/step_cost.py). CUDA was not
# measured.
_CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2**33}
_MOST_PAIRS = 256


@dataclass
class _Known:
    """What was found out about one model.

    Attributes:
        looped: modules that run sample by sample, by path, with the reason.
        kept: bytes that the graph of one pair keeps, by shapes and constants.
    """

    looped: dict[str, str] = field(default_factory=dict)
    kept: dict[Hashable, int] = field(default_factory=dict)


@dataclass(frozen=True)
class GhostEngine:
    """Inner products of per-sample gradients, layer by layer, from layer inputs and gradients of layer outputs.

    For a layer y_t = W a_t at positions t, the gradient of one sample's loss is G = sum_t d_t a_t^T with d_t the
    gradient for y_t. The engine runs both views of a chunk as one batch, asks autograd for all d (and for no gradient
    of a parameter), and takes ||G_w||^2, ||G_s||^2, ⟨G_w, G_s⟩ from a and d, in the cheaper of two forms a layer:

        gradient    G itself, one layer at a time: T p c multiplications a sample
        gram        sum over t, t' of ⟨a_t, a_t'⟩ ⟨d_t, d_t'⟩: T^2 (c + p)

    Both are exact. What has no rule (bare and parametrised weights, scales and shifts, recurrences of one's own) is
    exact too: its per-sample gradient is formed. A parameter used several times has one sum of gradients.

    The forward runs under `torch.func.vmap`, which keeps track of the samples' dimension. A module inside the model
    that vmap refuses (its control flow depends on its input, say) runs sample by sample, the rest as before; it is told
    once by the logger "gradconsist". A model that it refuses as a whole needs `LoopEngine`, to which ``engine="auto"``
    turns by itself.

    Args:
        form: "auto" chooses by a count of multiplications and passes over memory, the same in every run. "gradient"
            and "gram" force one form wherever a layer has both. In float32, "gram" gives way to "gradient" where
            positions cancel so far that accuracy would suffer.
    """

    projects: ClassVar[bool] = True
    form: Form = "auto"
    _models: WeakKeyDictionary[Any, _Known] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)

    def __reduce__(self) -> tuple[Any, ...]:
        # What was found out belongs to models: a copy finds out for itself.
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
        """Modules of `model` that run sample by sample, by path, with what torch said of them under vmap."""
        return dict(self._models[model].looped) if model in self._models else {}

    def _known(self, problem: Problem) -> _Known:
        return _Known() if problem.model is None else self._models.setdefault(problem.model, _Known())

    def _products(self, problem: Problem) -> GradProducts:
        if problem.graph_weak == problem.graph_strong and _stackable(problem.weak, problem.strong):
            seen = self._see_both(problem)
            with torch.set_grad_enabled(problem.graph_weak):
                return _total(problem, self._grams(problem, seen))
        weak, strong = (self._see_one(problem, view) for view in (WEAK, STRONG))
        with torch.set_grad_enabled(problem.graph_weak or problem.graph_strong):
            return _total(problem, self._grams_of_two(problem, weak, strong))

    def _see_both(self, problem: Problem) -> Seen:
        """Both views as one batch."""
        samples, target = _interleaved(problem.weak, problem.strong), problem.target.repeat_interleave(2, 0)
        view = torch.tensor([WEAK, STRONG], device=target.device).repeat(len(problem.target))
        return see(problem, samples, target, view, problem.graph_weak, self._known(problem).looped)

    def _see_one(self, problem: Problem, view: int) -> Seen:
        samples, graph = ((problem.weak, problem.graph_weak), (problem.strong, problem.graph_strong))[view]
        views = torch.full([len(problem.target)], view, device=problem.target.device)
        return see(problem, samples, problem.target, views, graph, self._known(problem).looped)

    def routes(self, problem: Problem) -> dict[str, str]:
        """How each compared parameter reaches its inner products.

        Args:
            problem: the pairs.

        Returns:
            A description by parameter name; empty where the losses do not depend on it.
        """
        together = _stackable(problem.weak, problem.strong)
        seen = self._see_both(problem) if together else self._see_one(replace(problem, graph_weak=False), WEAK)
        exact = _exact(problem)
        return {
            name: self._route(name, seen, paired=together) if name in exact else route(name, seen, problem.projection)
            for name in problem.parameters
        }

    def _route(self, name: str, seen: Seen, *, paired: bool) -> str:
        uses, rest = seen.of(name), ["per-sample gradient"] if name in seen.rows else []
        single = _single(name, seen)
        form = "gradient"
        if single is not None and paired:
            form = chosen(*single, self.form)
        parts = list(dict.fromkeys([f"{use.rule.name}, {form} form" for use, _ in uses] + rest))
        count = len(uses) + len(rest)
        return " + ".join(parts) + (f" ({count} uses as one)" if count > 1 else "")

    def preferred_chunk(self, problem: Problem) -> int:
        """The size from which on more pairs gain nothing, less where a pair's graph is so large that they do not fit.

        The graph of one pair is built once to see how much it keeps.
        """
        kind = next(iter(problem.parameters.values())).device.type
        limit = _CHUNK_BYTES.get(kind, _CHUNK_BYTES["cpu"])
        tensors = [*problem.parameters.values(), *leaves(problem.weak)]
        sketched = problem.projection and (problem.projection.kind, problem.projection.dim)
        key = (
            problem.graph_weak,
            problem.graph_strong,
            sketched,
            constants(problem.weak),
            *((tensor.shape[1:], tensor.dtype) for tensor in tensors),
        )
        kept = self._known(problem).kept
        if key not in kept:
            try:
                kept[key] = self._graph_bytes(problem)
            except RuntimeError:  # comes again with the first chunk, where it is dealt with
                return 1
        return max(1, min(_MOST_PAIRS, limit // max(1, kept[key])))

    def _graph_bytes(self, problem: Problem) -> int:
        """What the graph of one pair keeps."""
        kept: dict[int, int] = {}

        def weigh(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        device = problem.target.device
        one = problem.take(torch.zeros(1, dtype=torch.long, device=device))
        with (
            preserved_randomness(device, seed=0),  # a trial must not draw what the call itself would
            torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor),
        ):
            self.products(one)
        return sum(kept.values())

    def _grams(self, problem: Problem, seen: Seen) -> list[Tensor | None]:
        """M of every parameter, or of its sketch, from samples that come interleaved."""
        found = [] if problem.projection is None else sketches(seen, problem.parameters, problem.projection).values()
        return [*map(pair_gram, found), *(self._gram(name, seen) for name in _exact(problem))]

    def _grams_of_two(self, problem: Problem, weak: Seen, strong: Seen) -> list[Tensor | None]:
        """The same from views that were seen one by one."""
        grams = [self._gram_of_two(name, weak, strong, len(problem.target)) for name in _exact(problem)]
        if problem.projection is not None:
            mine, other = (sketches(seen, problem.parameters, problem.projection) for seen in (weak, strong))
            grams += [_gram_of_rows(mine.get(name), other.get(name)) for name in {**mine, **other}]
        return grams

    def _gram(self, name: str, seen: Seen) -> Tensor | None:
        """M of one parameter, from samples that come interleaved."""
        single = _single(name, seen)
        if single is not None:
            return products(*single, self.form)
        gradient = seen.gradient(name)
        return None if gradient is None else pair_gram(gradient)

    def _gram_of_two(self, name: str, weak: Seen, strong: Seen, samples: int) -> Tensor | None:
        """M of one parameter, from views that were seen one by one."""
        if name not in weak.rows and name not in strong.rows and len(weak.of(name)) == len(strong.of(name)) == 1:
            (a, d_weak), (b, d_strong) = weak.of(name)[0], strong.of(name)[0]
            # Outputs have a sample's maps or positions folded into the rows; pairs are pairs of samples.
            d_weak, d_strong = (d.unflatten(0, (samples, -1)) for d in (d_weak, d_strong))
            if a.rule == b.rule and d_weak.shape == d_strong.shape and _shape(a.input) == _shape(b.input):
                x = None if a.input is None or b.input is None else _pairwise(a.input, b.input)
                return products(a.rule, x, _pairwise(d_weak, d_strong).flatten(0, 1), self.form)
        return _gram_of_rows(weak.gradient(name), strong.gradient(name))


def _exact(problem: Problem) -> list[str]:
    """The parameters whose gradients are compared as they are."""
    projection = problem.projection
    if projection is None:
        return list(problem.parameters)
    return [name for name, p in problem.parameters.items() if not (projection.flat or projection.shrinks(p.shape))]


def _gram_of_rows(weak: Tensor | None, strong: Tensor | None) -> Tensor | None:
    """M of gradients or sketches [n, ...]; None is zero."""
    given = strong if weak is None else weak
    if given is None:
        return None
    zeros = torch.zeros_like(given)
    return pair_gram(_pairwise(zeros if weak is None else weak, zeros if strong is None else strong))


def _single(name: str, seen: Seen) -> tuple[Rule, Tensor | None, Tensor] | None:
    """Rule, input and output gradient where a parameter has one use, or several that are one; else None."""
    uses = seen.of(name)
    if name in seen.rows or not uses:
        return None
    if len(uses) == 1:
        return uses[0][0].rule, uses[0][0].input, uses[0][1]
    if all(isinstance(use.rule, LinearWeight) for use, _ in uses):
        return uses[0][0].rule, *joined([(use.input, d) for use, d in uses])
    return None


def _total(problem: Problem, grams: list[Tensor | None]) -> GradProducts:
    found = [gram for gram in grams if gram is not None]
    parameter = next(iter(problem.parameters.values()))
    if not found:
        zeros = parameter.new_zeros(len(problem.target), dtype=wide_dtype(parameter))
        return GradProducts(zeros, zeros.clone(), zeros.clone())
    total = torch.stack(found).sum(0)
    return GradProducts(total[:, 0, 0], total[:, 1, 1], total[:, 0, 1])


def _stackable(weak: Inputs, strong: Inputs) -> bool:
    """Whether weak and strong samples can be rows of one batch."""
    pairs = zip(leaves(weak), leaves(strong), strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)


def _pairwise(weak: Tensor, strong: Tensor) -> Tensor:
    """w0, s0, w1, s1, ... from w0, w1, ... and s0, s1, ..."""
    return torch.stack([weak, strong], 1).flatten(0, 1)


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _interleaved(weak: Inputs, strong: Inputs) -> Inputs:
    mixed = [_pairwise(a, b) for a, b in zip(leaves(weak), leaves(strong), strict=True)]
    return mixed[0] if isinstance(weak, Tensor) else rebuilt(weak, mixed)
