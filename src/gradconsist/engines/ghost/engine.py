"""The engine: one batched forward, gradients of layer outputs, and inner products layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Container, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from gradconsist.batch import leaves, map_leaves
from gradconsist.engines.base import Problem
from gradconsist.engines.ghost.capture import Capture
from gradconsist.engines.ghost.conv import Stage
from gradconsist.engines.ghost.coverage import check_coverage, check_inputs
from gradconsist.engines.ghost.gram import pair_gram
from gradconsist.engines.ghost.layers import culprit, intercepted
from gradconsist.engines.ghost.record import Use
from gradconsist.engines.ghost.rules import FORMS, Form, LinearWeight, chosen, joined, products
from gradconsist.engines.loop import refused_by_vmap
from gradconsist.errors import GradConsistError
from gradconsist.randomness import preserved_randomness
from gradconsist.recall import OtherForwardError, Recalled
from gradconsist.similarity import GradProducts
from gradconsist.types import Inputs
from gradconsist.validation import check_choice

logger = logging.getLogger("gradconsist")

# Fixed numbers and not timings, so that a resumed run adds up in the same order and stays bitwise equal: the size from
# which on more pairs gain nothing (benchmarks/step_cost.py on CPU; CUDA not measured yet), and what a chunk may hold.
_CHUNK = {"cpu": 14, "cuda": 64}
_CHUNK_BYTES = {"cpu": 2**30, "cuda": 2**33}


@dataclass(frozen=True)
class Seen:
    """One forward of N samples, differentiated for the outputs of its layers.

    Attributes:
        uses: every call of an operator with a rule whose output the losses depend on.
        outputs: for each use the gradient of its output.
        rows: per-sample gradients [N, *shape] through everything else, by parameter; absent where there is none.
    """

    uses: list[Use]
    outputs: list[Tensor]
    rows: dict[str, Tensor]

    def of(self, name: str) -> list[tuple[Use, Tensor]]:
        """Uses of one parameter, with the gradients of their outputs."""
        return [(use, d) for use, d in zip(self.uses, self.outputs, strict=True) if use.parameter == name]

    def gradient(self, name: str) -> Tensor | None:
        """Per-sample gradients [N, *shape] of one parameter, over all its uses; None where the losses ignore it."""
        parts = [use.rule.gradients(use.input, d) for use, d in self.of(name)]
        parts += [self.rows[name]] if name in self.rows else []
        if not parts:
            return None
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        return torch.stack([part.to(wide) for part in parts]).sum(0) if len(parts) > 1 else parts[0]


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
        form: "auto" chooses by a count of multiplications and passes over memory, the same in every run. "measured"
            times both on first use, for each layer and shape, and keeps the faster: for hardware that the count does
            not fit; since a clock decides, two runs may differ by rounding, and a resumed run from the uninterrupted
            one. "gradient" and "gram" force one form wherever a layer has both. In float32, "gram" gives way to
            "gradient" where positions cancel so far that accuracy would suffer.
    """

    form: Form = "auto"
    recall_bytes: int = field(default=2**28, repr=False)
    _looped: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _measured: dict[Hashable, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _unlike: set[int] = field(default_factory=set, init=False, repr=False, compare=False)
    _kept: dict[Any, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)

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
            if path is None or path in self._looped:
                raise refusal from error
            self._looped[path] = str(error)
        try:
            products = self.products(problem)
        except BaseException:
            del self._looped[path]
            raise
        logger.warning("%r runs sample by sample from now on, since vmap refused it: %s", path, self._looped[path])
        return products

    @property
    def looped(self) -> Mapping[str, str]:
        """Modules that run sample by sample, by path, with what torch said of them under vmap."""
        return dict(self._looped)

    def _products(self, problem: Problem) -> GradProducts:
        if problem.graph_weak == problem.graph_strong and _stackable(problem.weak, problem.strong):
            seen = self._see_both(problem, problem.recalled)
            with torch.set_grad_enabled(problem.graph_weak):
                return _total(problem, [self._gram(name, seen) for name in problem.parameters])
        weak = see(problem, problem.weak, problem.target, problem.graph_weak, self._looped)
        strong = see(problem, problem.strong, problem.target, problem.graph_strong, self._looped)
        with torch.set_grad_enabled(problem.graph_weak or problem.graph_strong):
            return _total(
                problem, [self._gram_of_two(name, weak, strong, len(problem.target)) for name in problem.parameters]
            )

    def _see_both(self, problem: Problem, recalled: Recalled | None) -> Seen:
        """Both views as one batch."""
        samples, target = _interleaved(problem.weak, problem.strong), problem.target.repeat_interleave(2, 0)
        key = id(problem.model)
        if recalled is not None and key not in self._unlike:
            try:
                return see(problem, samples, target, problem.graph_weak, self._looped, recalled)
            except OtherForwardError:
                self._unlike.add(key)
        return see(problem, samples, target, problem.graph_weak, self._looped)

    def routes(self, problem: Problem) -> dict[str, list[str]]:
        """How each compared parameter reaches its inner products: one entry a use; none where the losses ignore it.

        Args:
            problem: the pairs.

        Returns:
            Descriptions by parameter name.
        """
        target = problem.target.repeat_interleave(2, 0)
        stackable = _stackable(problem.weak, problem.strong)
        inputs = _interleaved(problem.weak, problem.strong) if stackable else problem.weak
        seen = see(problem, inputs, target if stackable else problem.target, False, self._looped)
        found = {}
        for name in problem.parameters:
            uses = seen.of(name)
            forms = ["gradient"] * len(uses)
            if len(uses) == 1 and name not in seen.rows:
                forms = [chosen(use.rule, use.input, d, self.form, self._measured) for use, d in uses]
            found[name] = [f"{use.rule.name}, {form} form" for (use, _), form in zip(uses, forms, strict=True)]
            found[name] += ["per-sample gradient"] if name in seen.rows else []
        return found

    def preferred_chunk(self, problem: Problem) -> int:
        """The size from which on more pairs gain nothing, less where a pair's graph is so large that they do not fit.

        The graph of one pair is built once to see how much it keeps.
        """
        kind = next(iter(problem.parameters.values())).device.type
        most, limit = (table.get(kind, table["cpu"]) for table in (_CHUNK, _CHUNK_BYTES))
        tensors = [*problem.parameters.values(), *leaves(problem.weak)]
        key = (problem.graph_weak, problem.graph_strong, *((tensor.shape[1:], tensor.dtype) for tensor in tensors))
        if key not in self._kept:
            try:
                self._kept[key] = self._graph_bytes(problem)
            except RuntimeError:  # comes again with the first chunk, where it is dealt with
                return 1
        return max(1, min(most, limit // max(1, self._kept[key])))

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

    def _gram(self, name: str, seen: Seen) -> Tensor | None:
        """M of one parameter, from samples that come interleaved."""
        uses = seen.of(name)
        if name not in seen.rows:
            if len(uses) > 1 and all(isinstance(use.rule, LinearWeight) for use, _ in uses):
                x, d = joined([(use.input, d) for use, d in uses])
                return products(uses[0][0].rule, x, d, self.form, self._measured)
            if len(uses) == 1:
                return products(uses[0][0].rule, uses[0][0].input, uses[0][1], self.form, self._measured)
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
                return products(a.rule, x, _pairwise(d_weak, d_strong).flatten(0, 1), self.form, self._measured)
        g_weak, g_strong = weak.gradient(name), strong.gradient(name)
        given = g_strong if g_weak is None else g_weak
        if given is None:
            return None
        zeros = torch.zeros_like(given)
        return pair_gram(_pairwise(zeros if g_weak is None else g_weak, zeros if g_strong is None else g_strong))


def see(
    problem: Problem,
    inputs: Inputs,
    target: Tensor,
    graph: bool,
    looped: Container[str] = (),
    recalled: Recalled | None = None,
) -> Seen:
    """One forward and one backward, to the outputs of layers, for a batch of samples.

    Args:
        problem: losses and compared parameters.
        inputs: N samples.
        target: their targets.
        graph: whether the result can be differentiated.
        looped: paths of modules that run sample by sample.
        recalled: what convolutions returned for these samples in an earlier forward, or None.

    Returns:
        What was seen.

    Raises:
        OtherForwardError: the forward that was recalled had other calls.
    """
    is_tensor = isinstance(inputs, Tensor)
    columns = leaves(inputs)
    uses: list[Use] = []
    stage = Stage(outputs_only=True)

    def loss(stand_ins: Mapping[str, Tensor], target: Tensor, *sample: Tensor) -> Tensor:
        batched = [leaf.unsqueeze(0) for leaf in sample]
        one: Inputs = batched[0] if is_tensor else _rebuilt(inputs, batched)
        capture = Capture(problem.parameters, stand_ins, stage, recalled)
        try:
            with intercepted(problem.model, capture.layer, capture.one_by_one, looped), capture:
                result = problem.losses(one, target.unsqueeze(0), stand_ins).squeeze(0)
            uses.extend(capture.uses)
            calls = capture.convolutions
        finally:
            capture.release()
        if recalled is not None and calls != len(recalled.calls):
            raise OtherForwardError
        return result

    in_dims = (0, 0, *[0] * len(columns))
    with torch.enable_grad():
        stand_ins = {name: p.expand(len(target), *p.shape) for name, p in problem.parameters.items()}
        batched = vmap(loss, in_dims=in_dims, randomness="different" if problem.random else "error")
        losses = batched(stand_ins, target, *columns)
        wanted: list[Any] = [*(use.output for use in uses), *stand_ins.values()]
        # The sum and not the mean: each output gradient is that of its own sample's loss.
        found = torch.autograd.grad(losses.sum(), wanted, create_graph=graph, allow_unused=True)
    stage.outputs_only = False
    outputs, rows = found[: len(uses)], dict(zip(stand_ins, found[len(uses) :], strict=True))
    check_inputs(uses)
    check_coverage(losses, uses, outputs)
    seen = Seen(
        [use for use, d in zip(uses, outputs, strict=True) if d is not None],
        [d for d in outputs if d is not None],
        {name: row for name, row in rows.items() if row is not None},
    )
    return seen if graph else _constant(seen)


def _constant(seen: Seen) -> Seen:
    uses = [replace(use, rule=use.rule.constant(), inputs=tuple(x.detach() for x in use.inputs)) for use in seen.uses]
    return Seen(uses, [d.detach() for d in seen.outputs], {name: row.detach() for name, row in seen.rows.items()})


def _total(problem: Problem, grams: list[Tensor | None]) -> GradProducts:
    found = [gram for gram in grams if gram is not None]
    parameter = next(iter(problem.parameters.values()))
    if not found:
        zeros = parameter.new_zeros(len(problem.target), dtype=torch.promote_types(parameter.dtype, torch.float32))
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
    return mixed[0] if isinstance(weak, Tensor) else _rebuilt(weak, mixed)


def _rebuilt(template: Inputs, values: list[Tensor]) -> Inputs:
    supply = iter(values)
    rebuilt: Inputs = map_leaves(lambda _: next(supply), template)
    return rebuilt
