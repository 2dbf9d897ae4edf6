"""One comparison from checked pairs to the loss: statistics, chunks, weights, reduction, record.

Knows engines only by their seam, and layers not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any

import torch
from torch import Tensor

from gradconsist._consistency.gradient_buffer import GradientBuffer, zero
from gradconsist._consistency.settings import Settings
from gradconsist._consistency.similarity import Criterion, cosine, degenerate_pairs
from gradconsist._consistency.trial import Probed, probe_model
from gradconsist._forward.batchnorm import BatchNormCalls, Constants, StatisticsMissingError, needs_statistics
from gradconsist._forward.per_sample import PerSampleForward
from gradconsist._forward.sandbox import autocast_region, our_rules
from gradconsist._forward.sparse import aliases, sparse_parameters
from gradconsist._forward.statistics import StatisticsPath, check_can_follow, take_statistics
from gradconsist._inputs.chosen_pairs import Subset, select
from gradconsist._inputs.pairs import Pairs, non_finite_tensor
from gradconsist._inputs.parameters import compared_parameters, trainable_parameters
from gradconsist._refusals.graphs import check_second_derivative
from gradconsist.engines.base import Problem
from gradconsist.engines.projection import Projector
from gradconsist.errors import NonFiniteError
from gradconsist.types import ConsistencyRecord, GradProducts

# Float16 gradients below 6e-8 vanish. GradScaler starts at 2^16 on a mean over about 2^6 samples.
_FLOAT16_LOSS_SCALE = 2.0**10
# Pairs of large gradients, beyond 65504 with it, are computed with less, by these steps and down to about this.
_FLOAT16_SCALE_STEP, _FLOAT16_LEAST_SCALE = 2.0**6, 2.0**-2
# So do derivatives for them, of norm weight / ||g|| a pair and spread over all parameters: these are brought to this.
_FLOAT16_DERIVATIVE_NORM = 2.0**7


@dataclass(frozen=True)
class Comparison:
    """One call of a loss, beside its pairs.

    Attributes:
        settings: the loss's options.
        criterion: what a pair adds.
        generator: source of randomness.
        probed: what earlier calls found out about the model; added to.
        statistics: given constants of the BatchNorm calls, of both views or for each; or None.
        projection: matrices of this call, or None.
        measure: whether numbers are wanted and no derivative.
    """

    settings: Settings
    criterion: Criterion
    generator: torch.Generator
    probed: Probed
    statistics: Constants | None = None
    projection: Projector | None = None
    measure: bool = False

    @cached_property
    def compared(self) -> Mapping[str, Tensor]:
        """E, by name."""
        return compared_parameters(self.settings.model, self.settings.encoder)

    @cached_property
    def trainable(self) -> Mapping[str, Tensor]:
        """What L_g is differentiated for, by name."""
        return trainable_parameters(self.settings.model)

    @property
    def constant(self) -> tuple[str | None, ...]:
        """Views whose gradient has no graph."""
        return ("weak", "strong") if self.measure else (self.settings.stop_gradient,)

    @property
    def dropout(self) -> bool:
        """Whether random layers stay on."""
        return self.settings.dropout == "on"

    @property
    def fused(self) -> bool:
        """Whether the gradient is formed inside."""
        return self.settings.fused and not self.measure

    @property
    def reduction(self) -> str:
        """As for the loss; a measurement tells pairs apart."""
        return "none" if self.measure else self.settings.reduction

    @property
    def through_statistics(self) -> bool:
        """Whether the joint statistics are differentiated, too."""
        return self.settings.through_statistics and not self.measure


def compare(options: Comparison, pairs: Pairs) -> tuple[Tensor, ConsistencyRecord]:
    """L_g and the record of `pairs`.

    Args:
        options: the loss's options.
        pairs: checked arguments.

    Returns:
        The loss (scalar, or [B] without reduction) and what was seen.

    Raises:
        GradConsistError: the model cannot be compared exactly, or a gradient is not finite.
        ModelError: the model or `loss_fn` failed with an error of torch's or Python's own.
    """
    selection = select(pairs, options.settings.max_pairs, options.reduction, options.generator, _wide(options))
    source = options.generator
    seed = int(torch.randint(2**62, (), generator=source, device=source.device)) if options.dropout else None
    autocast = autocast_region(pairs.device)
    views = {"weak": pairs.weak, "strong": pairs.strong}
    with our_rules(options.settings.model, pairs.device, views, seed=seed, dropout=options.dropout):
        return _Run(options, pairs, selection, autocast).result()


def _wide(options: Comparison) -> torch.dtype:
    """The dtype of products and loss: the compared parameters' widest, float32 at least."""
    return reduce(torch.promote_types, (parameter.dtype for parameter in options.compared.values()), torch.float32)


class _Run:
    """The state of one call."""

    def __init__(
        self, options: Comparison, pairs: Pairs, selection: Subset, autocast: tuple[str, torch.dtype] | None
    ) -> None:
        self.options = options
        self.settings = options.settings
        self.pairs = pairs
        self.selection = selection
        dtypes = [parameter.dtype for parameter in options.trainable.values()]
        half = torch.float16 in (dtypes if autocast is None else [autocast[1], *dtypes])
        # Where the derivative is the user's own backward, their GradScaler scales it, and this would work against it.
        own = options.fused or not torch.is_grad_enabled()
        self.scale = _FLOAT16_LOSS_SCALE if half and own else 1.0
        self.drop_non_finite = half
        self.batchnorm = BatchNormCalls(options.settings.batchnorm, options.statistics)
        self.sparse = sparse_parameters(options.settings.model) - options.probed.dense
        self.aliases = aliases(options.trainable, self.sparse)  # see GradientBuffer
        self.forward = PerSampleForward(
            options.settings.model,
            options.settings.loss_fn,
            self.batchnorm,
            parameters=self.aliases,
            dropout=options.dropout,
            autocast=autocast,
            loss_scale=self.scale,
        )
        self.through: list[Tensor] = []  # joint statistics for which the chunks are differentiated
        self.wide = _wide(options)
        count = len(pairs)
        self.cosine = torch.full([count], torch.nan, dtype=self.wide, device=pairs.device)
        self.norm_weak = self.cosine.clone()
        self.norm_strong = self.cosine.clone()
        self.degenerate = torch.zeros(count, dtype=torch.bool, device=pairs.device)
        self.scales = torch.full_like(self.cosine, self.scale)

    def result(self) -> tuple[Tensor, ConsistencyRecord]:
        if len(self.selection.index):
            views = self.pairs.weak, self.pairs.strong
            if self.options.statistics is None and needs_statistics(self.settings.model, self.settings.batchnorm):
                take_statistics(self.forward, *views)
            try:
                loss = self._loss()
            except StatisticsMissingError:  # a BatchNorm that no module announced
                take_statistics(self.forward, *views)
                loss = self._loss()
        else:
            loss = self._connected(self._zero())
        compared = torch.zeros_like(self.degenerate)
        compared[self.selection.index] = True
        record = ConsistencyRecord(self.cosine, self.norm_weak, self.norm_strong, self.degenerate, compared)
        return loss, record

    def _loss(self) -> Tensor:
        probe_model(self.forward, self.pairs, self.selection.index, self.options.probed, self.options.compared)
        self.sparse -= self.options.probed.dense  # in place: the aliases look at it
        problem = Problem(
            losses=self.forward.losses,
            parameters={name: self.aliases[name] for name in self.options.compared},
            weak=self.pairs.weak,
            strong=self.pairs.strong,
            target=self.pairs.target,
            graph_weak="weak" not in self.options.constant,
            graph_strong="strong" not in self.options.constant,
            random=self.options.dropout,
            model=self.settings.model,
            projection=self.options.projection,
        )
        with suppress(_EngineChangedError):
            return self._sum(problem)
        # From the first pair on, so that sums have one order whenever the engine changes: a resumed run, which meets
        # the change anew, stays bitwise equal.
        return self._sum(problem)

    def _sum(self, problem: Problem) -> Tensor:
        """The sum over chunks, its gradient formed on the way if fused."""
        options = self.options
        path = self._path()
        self.through = path.cut() if path and options.fused else []
        if path and not options.fused:
            path.join()
        buffer = GradientBuffer(list(self.aliases.values()), self.through) if options.fused else None
        total = self._zero()
        start, size = 0, self._chunk_size(problem)
        while start < len(self.selection.index):
            rows = slice(start, start + size)
            index = self.selection.index[rows]
            try:
                terms = self._attempt(problem, index, self.selection.weight[rows], buffer)
            except torch.OutOfMemoryError:
                if options.settings.chunk_size != "auto" or size == 1:
                    raise
                size = (size + 1) // 2
                torch.cuda.empty_cache()
                continue
            if options.reduction == "none":
                total = total.index_add(0, index, terms)
            elif buffer is None:
                total = total + terms.sum()
            start += size
        if buffer is None:
            return self._connected(total)
        if path:
            buffer.add_through(path.again())
        return buffer.attach(options.trainable, self.sparse)

    def _path(self) -> StatisticsPath | None:
        """The way of the joint statistics, where L_g is differentiated through them."""
        options = self.options
        if not options.through_statistics or self.batchnorm.recorded is None or not torch.is_grad_enabled():
            return None
        check_can_follow(given=options.statistics is not None, half=self.drop_non_finite)
        stand_ins = partial(aliases, options.trainable, self.sparse)
        return StatisticsPath(self.forward, self.pairs.weak, self.pairs.strong, stand_ins)

    def _attempt(self, problem: Problem, index: Tensor, weight: Tensor, buffer: GradientBuffer | None) -> Tensor:
        """One chunk's terms; where torch refuses the engine and another one takes the chunk, everything starts anew."""
        try:
            return self._chunk(problem, index, weight, buffer)
        except torch.OutOfMemoryError:
            raise  # a smaller chunk may fit
        except RuntimeError as error:
            fall_back: Any = getattr(self.settings.engine, "fall_back", None)
            if fall_back is None:
                raise
            with fall_back(error):
                self._chunk(problem, index[:1], weight[:1], buffer)
            raise _EngineChangedError from error

    def _chunk(self, problem: Problem, index: Tensor, weight: Tensor, buffer: GradientBuffer | None) -> Tensor:
        terms = self._terms(problem, index, weight)
        # The automatic engine may have changed, so it is part of the fact.
        fact = Probed.fact(f"derivative by {self.settings.engine!r}", self.settings.model, problem.weak)
        first = terms.requires_grad and fact not in self.options.probed.passed  # `measure` has nothing to settle
        if first:
            expected = [*self.options.trainable.values(), *self.through]
            check_second_derivative(terms, expected, fused=buffer is not None)
        if buffer is not None:
            buffer.add(terms.sum(), self._amplification(index, weight) if self.drop_non_finite else 1.0)
        elif first:
            # Fails here, by name, and not in the user's own backward.
            aliases = list(self.aliases.values())
            torch.autograd.grad(terms.sum(), aliases, allow_unused=True, retain_graph=True)
        if first:
            self.options.probed.passed.add(fact)
        return terms

    def _amplification(self, index: Tensor, weight: Tensor) -> float:
        """A power of two that keeps the derivatives of a chunk within float16."""
        steep = self.options.criterion.steepness(self.norm_weak[index], self.norm_strong[index])
        slopes = weight.detach() * steep / self.scales[index]
        steepest = float(slopes.masked_fill(self.degenerate[index], 0.0).max())
        return 1.0 if steepest == 0.0 else 2.0 ** math.floor(math.log2(_FLOAT16_DERIVATIVE_NORM / steepest))

    def _terms(self, problem: Problem, index: Tensor, weight: Tensor) -> Tensor:
        """The weighted terms of the pairs `index`, and their rows of the record."""
        products = self._products(problem, index)
        degenerate = degenerate_pairs(products, self.settings.min_norm)
        similarity = cosine(products, degenerate)
        self.degenerate[index] = degenerate
        self.norm_weak[index] = products.weak.detach().sqrt()
        self.norm_strong[index] = products.strong.detach().sqrt()
        self.cosine[index] = similarity.detach().masked_fill(degenerate, torch.nan)
        return weight * self.options.criterion.terms(products, similarity, degenerate)

    def _products(self, problem: Problem, index: Tensor, scale: float | None = None) -> GradProducts:
        """Finite inner products of the pairs `index`; zeros (degenerate) where float16 overflows at every scale."""
        scale = self.scale if scale is None else scale
        self.forward.loss_scale = scale
        self.scales[index] = scale
        chunk = problem.take(index)
        products = GradProducts(*(part / scale**2 for part in self.settings.engine.products(chunk)))
        finite = products.isfinite()
        if bool(finite.all()):
            return products
        culprit = non_finite_tensor(self.settings.model, chunk.weak, chunk.strong)
        if culprit is not None or not self.drop_non_finite:
            cause = "the loss, its gradient or the gradient's squared norm overflowed or divided by 0"
            cause = f"{culprit} has such entries" if culprit else cause
            raise NonFiniteError(
                f"the gradients of {int((~finite).sum())} of {len(index)} pairs are NaN or infinite: {cause}. Skip the"
                " step; if it comes again, lower the learning rate or compute in a wider dtype."
            )
        # Computed again, each on their own: multiplied by 0 the others would still send NaN backwards.
        parts = [(finite, scale)]
        if scale > _FLOAT16_LEAST_SCALE:
            parts.append((~finite, scale / _FLOAT16_SCALE_STEP))
        zeros = torch.zeros(len(index), dtype=products.weak.dtype, device=index.device)
        total = GradProducts(zeros, zeros.clone(), zeros.clone())
        for mask, part_scale in parts:
            rows = mask.nonzero().squeeze(1)
            if len(rows):
                part = self._products(problem, index[rows], part_scale)
                total = GradProducts(*(old.index_copy(0, rows, new) for old, new in zip(total, part, strict=True)))
        return total

    def _chunk_size(self, problem: Problem) -> int:
        everything, size = len(self.selection.index), self.settings.chunk_size
        if size is None or isinstance(size, int):
            return everything if size is None else size
        preferred: Any = getattr(self.settings.engine, "preferred_chunk", None)
        # Of a pair that is compared: the others may hold what the model cannot take.
        most = everything if preferred is None else int(preferred(problem.take(self.selection.index[:1])))
        return math.ceil(everything / math.ceil(everything / most))  # even: a rest of few pairs would be slow

    def _zero(self) -> Tensor:
        shape = (len(self.pairs),) if self.options.reduction == "none" else ()
        return torch.zeros(shape, dtype=self.wide, device=self.pairs.device)

    def _connected(self, total: Tensor) -> Tensor:
        """`total`, with a graph in any case: distributed reducers wait for every parameter, compared pairs or not."""
        if total.requires_grad or not torch.is_grad_enabled():
            return total
        return total + zero(self.options.trainable, self.sparse).to(total.dtype)


class _EngineChangedError(Exception):
    """The automatic engine took another way in the middle of a call; caught inside this module."""
