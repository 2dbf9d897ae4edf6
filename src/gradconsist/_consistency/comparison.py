"""Runs one comparison, from checked pairs to the loss: statistics, chunks, weights, reduction, record.

It uses engines only through `Engine.products`, and knows nothing of layers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gradconsist._consistency.call import Comparison
from gradconsist._consistency.gradient_buffer import GradientBuffer, zero
from gradconsist._consistency.similarity import cosine, degenerate_pairs
from gradconsist._consistency.trial import probe_engine, probe_functions, probe_model
from gradconsist._forward.batchnorm import BatchNormCalls, StatisticsMissingError, needs_statistics
from gradconsist._forward.per_sample import PerSampleForward
from gradconsist._forward.sandbox import autocast_region, our_rules
from gradconsist._forward.sparse import aliases, sparse_parameters
from gradconsist._forward.statistics import StatisticsPath, check_can_follow, take_statistics
from gradconsist._inputs.chosen_pairs import Subset, select
from gradconsist._inputs.pairs import Pairs, non_finite_tensor
from gradconsist._refusals.graphs import check_second_derivative
from gradconsist.engines.auto import AutoEngine
from gradconsist.engines.base import Problem
from gradconsist.errors import NonFiniteError
from gradconsist.types import ConsistencyRecord, GradProducts

# Bytes that the graph of a chunk may keep, and more for a few pairs, which keep all cores busy: fewer in a large call,
# whose memory they would add to. Fixed numbers rather than timings, so that a resumed run sums in the same order and
# stays bitwise equal (benchmarks/cost/step_cost.py, memory.py; CUDA was not measured).
_CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**33}
_MOST_BYTES = {"cpu": 3 * 2**29, "cuda": 2**33}
_BUSY_PAIRS, _BUSY_PAIRS_OF_MANY, _MANY = 28, 14, 112
# Float16 gradients below 6e-8 vanish. GradScaler starts at 2^16 on a mean over about 2^6 samples.
_FLOAT16_LOSS_SCALE = 2.0**10
# Pairs whose gradients exceed 65504 with that scale get smaller ones, in these steps and down to about this value.
_FLOAT16_SCALE_STEP, _FLOAT16_LEAST_SCALE = 2.0**6, 2.0**-2
# Derivatives for them also vanish: their norm is weight / ||g|| per pair, over all parameters. It is scaled to this.
_FLOAT16_DERIVATIVE_NORM = 2.0**7


class Compared(NamedTuple):
    """The result of a comparison.

    Attributes:
        loss: L_g, or its blend with the strong views' losses: scalar, or [B] without reduction.
        record: cosines and norms.
        term: L_g alone; without a graph in a blend.
        losses: the strong views' losses [B], 0 for pairs that were not compared and if nobody asked for them; without
            a graph in a fused blend.
    """

    loss: Tensor
    record: ConsistencyRecord
    term: Tensor
    losses: Tensor


def compare(options: Comparison, pairs: Pairs) -> Compared:
    """Computes L_g and the record of `pairs`, and the strong views' losses if they are wanted."""
    selection = select(pairs, options.settings.max_pairs, options.reduction, options.generator, options.wide)
    source = options.generator
    seed = int(torch.randint(2**62, (), generator=source, device=source.device)) if options.dropout else None
    autocast = autocast_region(pairs.device)
    views = {"weak": pairs.weak, "strong": pairs.strong}
    with our_rules(options.settings.model, pairs.device, views, seed=seed, dropout=options.dropout):
        return _Run(options, pairs, selection, autocast).result()


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
        # If the user's backward forms the derivative, their GradScaler scales it, and this scale would interfere.
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
        self.joined: list[Tensor] = []  # or those that lead to the parameters themselves, past the aliases
        self.wide = options.wide
        count = len(pairs)
        unknown = torch.full([3, count], torch.nan, dtype=self.wide, device=pairs.device)
        self.cosine, self.norm_weak, self.norm_strong = unknown
        self.degenerate = torch.zeros(count, dtype=torch.bool, device=pairs.device)
        self.scales = torch.full_like(self.cosine, self.scale)
        self._forget_losses()

    def result(self) -> Compared:
        if len(self.selection.index):
            views = self.pairs.weak, self.pairs.strong
            if self.options.statistics is None and needs_statistics(self.settings.model, self.settings.batchnorm):
                take_statistics(self.forward, *views)
            try:
                loss = self._loss()
            except StatisticsMissingError:  # F.batch_norm was called without a BatchNorm module
                take_statistics(self.forward, *views)
                loss = self._loss()
        else:
            loss = self._connected(self._zero())
        compared = torch.zeros_like(self.degenerate)
        compared[self.selection.index] = True
        record = ConsistencyRecord(self.cosine, self.norm_weak, self.norm_strong, self.degenerate, compared)
        blend = self.options.blend
        if self.options.fused:
            return Compared(loss, record, loss if blend is None else self.term, self.losses)
        losses = self._connected(self.losses) if self.options.losses else self.losses
        total = loss if blend is None else blend.term * loss + (blend.losses * losses).sum()
        return Compared(total, record, loss, losses)

    def _loss(self) -> Tensor:
        options, index = self.options, self.selection.index
        self.state = probe_model(self.forward, self.pairs, index, options.probed, options.compared)
        self.sparse -= self.options.probed.dense  # in place, because the aliases read this set
        problem = Problem(
            losses=self.forward.losses,
            parameters={name: self.aliases[name] for name in self.options.compared},
            weak=self.pairs.weak,
            strong=self.pairs.strong,
            target=self.pairs.target,
            graph_weak="weak" not in self.options.constant,
            graph_strong="strong" not in self.options.constant,
            random=self.options.dropout,
            with_losses=self.options.losses,
            model=self.settings.model,
            projection=self.options.projection,
        )
        path = self._path()
        self.through = path.cut() if path and self.options.fused else []
        self.joined = path.join() if path and not self.options.fused else []
        buffer, total = self._sum_by_any_engine(problem)
        if buffer is None:
            return self._connected(total)
        if path:
            buffer.add_through(path.again())
        return buffer.attach(self.options.trainable, self.sparse)

    def _sum_by_any_engine(self, problem: Problem) -> tuple[GradientBuffer | None, Tensor]:
        """Sums over chunks, with the loop if the automatic engine needs it."""
        engine = self.settings.engine
        try:
            return self._sum(problem)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not isinstance(engine, AutoEngine):
                raise
            # From the first pair again, so that the order of sums does not depend on when the engine changed. A resumed
            # run, in which the engine changes again, stays bitwise equal.
            with engine.loop_after(error):
                return self._sum(problem)

    def _sum(self, problem: Problem) -> tuple[GradientBuffer | None, Tensor]:
        """Sums over chunks: values and gradient into a buffer if fused, else the terms with their graph."""
        options, index, weight = self.options, self.selection.index, self.selection.weight
        size = self._chunk_size(problem)
        buffer = GradientBuffer(list(self.aliases.values()), self.through) if options.fused else None
        total = self._zero()
        self._forget_losses()
        start = 0
        while start < len(index):
            rows = slice(start, start + size)
            try:
                terms, losses = self._terms(problem, index[rows], weight[rows])
                value = self._blended(index[rows], terms, losses)
                self._check_graph(value, index[rows])
                if buffer is not None:
                    buffer.add(value, self._amplification(index[rows], weight[rows]))
            except torch.OutOfMemoryError:
                size = self._smaller(size)
                continue
            if options.reduction == "none":
                total = total.index_add(0, index[rows], terms)
            elif buffer is None:
                total = total + terms.sum()
            self._keep(index[rows], terms, losses)
            start += size
        return buffer, total

    def _blended(self, index: Tensor, terms: Tensor, losses: Tensor | None) -> Tensor:
        """Returns what a chunk is differentiated for, in one backward."""
        blend = self.options.blend
        if blend is None or losses is None:
            return terms.sum()
        return blend.term * terms.sum() + (blend.losses[index] * losses).sum()

    def _check_graph(self, value: Tensor, index: Tensor) -> None:
        """Checks every chunk's graph, since its samples may take other branches of the model than those before."""
        expected = [*self.aliases.values(), *self.through, *self.joined]
        found = check_second_derivative(value, expected, fused=self.options.fused, own=self.options.trainable)
        probe_functions(self.forward, self.pairs, index, self.options.probed, found)

    def _forget_losses(self) -> None:
        self.losses = torch.zeros_like(self.cosine)
        self.term = self._zero()  # L_g, if `loss` is a blend whose gradient is formed in the forward

    def _keep(self, index: Tensor, terms: Tensor, losses: Tensor | None) -> None:
        """Keeps the losses of a chunk; without their graph, and L_g too, if the chunk was differentiated."""
        if losses is None:
            return
        if self.options.fused:
            self.term, losses = self.term + terms.detach().sum(), losses.detach()
        self.losses = self.losses.index_copy(0, index, losses.to(self.wide))

    def _path(self) -> StatisticsPath | None:
        """Returns the path through the joint statistics if L_g is differentiated through them, else None."""
        options = self.options
        if not options.through_statistics or self.batchnorm.recorded is None or not torch.is_grad_enabled():
            return None
        check_can_follow(given=options.statistics is not None, half=self.drop_non_finite)
        stand_ins = partial(aliases, options.trainable, self.sparse)
        return StatisticsPath(self.forward, self.pairs.weak, self.pairs.strong, stand_ins)

    def _amplification(self, index: Tensor, weight: Tensor) -> float:
        """Returns a power of two that keeps the derivatives of a chunk within the range of float16; else 1."""
        if not self.drop_non_finite:
            return 1.0
        steep = self.options.criterion.steepness(self.norm_weak[index], self.norm_strong[index])
        slopes = weight.detach() * steep / self.scales[index]
        steepest = float(slopes.masked_fill(self.degenerate[index], 0.0).max())
        return 1.0 if steepest == 0.0 else 2.0 ** math.floor(math.log2(_FLOAT16_DERIVATIVE_NORM / steepest))

    def _terms(self, problem: Problem, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the weighted terms of the pairs `index` and their losses; fills in their entries of the record."""
        products = self._products(problem, index)
        degenerate = degenerate_pairs(products, self.settings.min_norm)
        similarity = cosine(products, degenerate)
        self.degenerate[index] = degenerate
        self.norm_weak[index] = products.weak.detach().sqrt()
        self.norm_strong[index] = products.strong.detach().sqrt()
        self.cosine[index] = similarity.detach().masked_fill(degenerate, torch.nan)
        return weight * self.options.criterion.terms(products, similarity, degenerate), products.losses

    def _products(self, problem: Problem, index: Tensor, scale: float | None = None) -> GradProducts:
        """Returns finite inner products of the pairs `index`; zeros (degenerate) if float16 always overflows."""
        scale = self.scale if scale is None else scale
        self.forward.loss_scale = scale
        self.scales[index] = scale
        chunk = problem.take(index)
        products = self.settings.engine.products(chunk)
        if scale != 1.0:
            products = GradProducts(*(part / scale**2 for part in products.present()))
        finite = products.isfinite()
        if bool(finite.all()):
            return products
        culprit = non_finite_tensor(self.settings.model, chunk.weak, chunk.strong)
        if culprit is not None or not self.drop_non_finite:
            cause = "the loss, its gradient or the gradient's squared norm overflowed or divided by 0"
            cause = f"{culprit} has such entries" if culprit else cause
            raise NonFiniteError(
                f"the gradients of {int((~finite).sum())} of {len(index)} pairs are NaN or infinite: {cause}. Skip the"
                " step; if it happens again, lower the learning rate or compute in a wider dtype."
            )
        # Both groups are computed again, separately: masked by 0, the others would still send NaN backwards.
        parts = [(finite, scale)]
        if scale > _FLOAT16_LEAST_SCALE:
            parts.append((~finite, scale / _FLOAT16_SCALE_STEP))
        zeros = torch.zeros(len(index), dtype=products.weak.dtype, device=index.device)
        total = GradProducts(zeros, zeros.clone(), zeros.clone())
        for mask, part_scale in parts:
            rows = mask.nonzero().squeeze(1)
            if len(rows):
                part = self._products(problem, index[rows], part_scale)
                total = GradProducts(
                    *(old.index_copy(0, rows, new) for old, new in zip(total.present(), part.present(), strict=True))
                )
        return total

    def _chunk_size(self, problem: Problem) -> int:
        """Tries the engine on a pair, and returns the number of pairs per chunk: the option, or what memory allows."""
        index, weight = self.selection.index, self.selection.weight
        one = lambda rows: self._terms(problem, index[rows], weight[rows])[0]  # noqa: E731
        terms = (partial(one, slice(i, i + 1)) for i in range(len(index)))
        engine, probed = self.settings.engine, self.options.probed
        # For the stand-ins: for the parameters themselves, gradient hooks of the user would run here.
        expected = [*self.aliases.values(), *self.through]
        kept = probe_engine(self.state, engine, problem, terms, expected, probed)
        everything, size = len(index), self.settings.chunk_size
        if size != "auto":
            return size or everything
        usual, limit = (
            table.get(index.device.type, table["cpu"]) // max(1, kept) for table in (_CHUNK_BYTES, _MOST_BYTES)
        )
        busy = _BUSY_PAIRS if everything <= _MANY else _BUSY_PAIRS_OF_MANY
        busy *= 1 + (problem.graph_weak != problem.graph_strong)  # else the views are one batch
        wanted = min(limit, max(usual, busy))
        most = min(everything, wanted, getattr(engine, "most_pairs", None) or everything, probed.fitted or everything)
        return math.ceil(everything / math.ceil(everything / max(1, most)))  # even: a small last one would be slow

    def _smaller(self, size: int) -> int:
        """Halves the size of a chunk that was out of memory, or raises the error again; later calls start with it."""
        if self.settings.chunk_size != "auto" or size == 1:
            raise
        self.options.probed.fitted = (size + 1) // 2
        torch.cuda.empty_cache()
        return self.options.probed.fitted

    def _zero(self) -> Tensor:
        shape = (len(self.pairs),) if self.options.reduction == "none" else ()
        return torch.zeros(shape, dtype=self.wide, device=self.pairs.device)

    def _connected(self, total: Tensor) -> Tensor:
        """Gives `total` a graph if it has none, because distributed reducers wait for every parameter."""
        if total.requires_grad or not torch.is_grad_enabled():
            return total
        return total + zero(self.options.trainable, self.sparse).to(total.dtype)
