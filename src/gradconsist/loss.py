"""`GradientConsistencyLoss`: the gradient consistency term L_g, ready to add to any loss."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gradconsist._consistency.call import Blend, Comparison
from gradconsist._consistency.comparison import Compared, compare
from gradconsist._consistency.own_state import OwnState
from gradconsist._consistency.settings import Reduction, Settings
from gradconsist._consistency.sharing import losses_obstacle
from gradconsist._consistency.similarity import Criterion, Disagreement
from gradconsist._forward.batchnorm import BatchNormPolicy, Constants
from gradconsist._forward.isolation import one_comparison, uncompiled
from gradconsist._inputs.cross_entropy import cross_entropy
from gradconsist._inputs.pairs import Pairs, check_pairs
from gradconsist._inputs.parameters import Encoder
from gradconsist._refusals.models import check_model
from gradconsist.engines import Engine
from gradconsist.engines.projection import RandomProjection
from gradconsist.errors import ConfigError, GradModeError, NonFiniteError
from gradconsist.types import ConsistencyRecord, Inputs, LossFunction, ViewPair


class GradientConsistencyLoss(OwnState):
    """Penalises pairs of views whose per-sample gradients point in different directions.

        L_g = 1/B * sum over pairs u of weight(u) * (1 - GC(u))

    For weak view w, strong view s, target t and the compared parameters E,

        g_w = d loss_fn(model(w), t) / dE,    g_s = d loss_fn(model(s), t) / dE,    GC = ⟨g_w, g_s⟩ / (||g_w|| ||g_s||)

    with all of E as one flat vector. Only the gradients for E are compared, but L_g is differentiable in every
    trainable parameter. A pair whose gradient norm is at most `min_norm` in either view gets weight 0 and is counted
    as degenerate. Per-sample gradients hold BatchNorm's statistics constant. The model's buffers, modes, ``.grad`` and
    the random state do not change.

    The loss is not a module and has no parameters: it neither copies nor registers `model`.

    Args:
        model: any module from a batch to logits (or to an object with ``logits``).
        encoder: the parameters E to compare: a module, a sequence of modules, a predicate on the names of
            ``model.named_parameters()``, or None for every trainable parameter. Frozen parameters have no gradient, so
            they are left out.
        loss_fn: ``(model output, target) -> [B]``. None is cross-entropy, for class indices [B] or probabilities
            [B, C].
        engine: "auto", "ghost", "loop", "vmap", or an object that implements `gradconsist.engines.Engine`.
        projection: None computes exact inner products. A `RandomProjection` computes them from sketches: the products
            are unbiased, their cosine is not.
        batchnorm: which statistics the comparison uses. "auto": a BatchNorm in train mode uses the joint statistics of
            this call's weak and strong inputs (all pairs, also those of weight 0); one in eval mode uses its running
            statistics. "batch" and "running" force one of the two. "observed" reuses the statistics of the method's own
            forward of each view, which saves a forward here but needs `GGCRWrapper`.
        through_statistics: True also differentiates L_g through the joint statistics, at the cost of one more forward
            and backward of all pairs. The compared gradients hold them constant either way.
        dropout: "off" switches random layers off during the comparison; "on" keeps them, with an independent draw per
            view and sample.
        chunk_size: how many pairs to process at a time: an int, None for all, or "auto" for what memory allows and
            keeps the cores busy (halved if a CUDA device runs out of memory). The result depends on it by rounding.
        max_pairs: compare at most this many pairs: a random subset of those with positive weight, rescaled so that the
            expectation does not change.
        stop_gradient: "weak" or "strong" treats that view's gradient as a constant.
        min_norm: a gradient whose norm is at most this counts as noise, with no direction. The unit is that of the loss
            per unit of a parameter.
        reduction: "mean" divides by the number of pairs of the call, also counting those of weight 0; "sum" does not
            divide; "none" returns [B] and needs ``fused=False``.
        fused: True computes the parameter gradient inside the call, chunk by chunk, and keeps one buffer of the
            parameters' size. False builds an ordinary graph over all chunks. Use it if inputs or weights require grad
            (the derivative for a weight of 0 is 0, because its pair is not compared).

    Attributes:
        last: the `ConsistencyRecord` of the last call, or None.

    Raises:
        ConfigError: an option has an invalid value, or conflicts with another.
        ParameterSelectionError: `encoder` selects no trainable parameter.
        UnsupportedModuleError: the result would not be exact for some module of the model.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> gc = GradientConsistencyLoss(model, encoder=model[0])
        >>> weak = torch.randn(5, 4)
        >>> loss = gc(weak, weak + 0.1 * torch.randn(5, 4), model(weak).argmax(1))
        >>> loss.backward()
        >>> f"{loss.item():.4f}", gc.last.summary()["degenerate"]
        ('0.0017', 0.0)

    Source: the paper's definition 1, eq. (2) and algorithm 1. The two forms of L_g given there differ by a constant.
    """

    criterion: ClassVar[Criterion] = Disagreement()

    def __init__(
        self,
        model: nn.Module,
        *,
        encoder: Encoder = None,
        loss_fn: LossFunction | None = None,
        engine: str | Engine = "auto",
        projection: RandomProjection | None = None,
        batchnorm: BatchNormPolicy = "auto",
        through_statistics: bool = False,
        dropout: Literal["off", "on"] = "off",
        chunk_size: int | Literal["auto"] | None = "auto",
        max_pairs: int | None = None,
        stop_gradient: Literal["weak", "strong"] | None = None,
        min_norm: float = 1e-8,
        reduction: Reduction = "mean",
        fused: bool = True,
    ) -> None:
        settings = Settings(
            model, encoder, cross_entropy if loss_fn is None else loss_fn, engine, projection, batchnorm,  # type: ignore[arg-type]
            through_statistics, dropout, chunk_size, max_pairs, stop_gradient, min_norm, reduction, fused,
        )  # fmt: skip
        super().__init__(settings)
        self.last: ConsistencyRecord | None = None

    def __call__(
        self,
        weak: Inputs,
        strong: Inputs,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Computes L_g of a batch of pairs.

        Args:
            weak: weakly augmented inputs: a tensor, or a dict, tuple or list of tensors and constants, batch first.
            strong: strongly augmented inputs of the same samples, in the same order.
            target: pseudo-labels for both views, as class indices [B] or probabilities [B, C]; their graph is ignored.
            weight: [B], non-negative, real or boolean; None means 1. Pairs of weight 0 count in BatchNorm's joint
                statistics and cost nothing else.
            generator: random source for the subset and for dropout's seed; None uses the loss's own.

        Returns:
            A scalar, or [B] with ``reduction="none"``, in float32 or wider. With no pair to compare, it is 0 and so is
            its gradient.

        Raises:
            GradConsistError: or a subclass, such as `GradModeError` where no graph can be built.
        """
        return self.evaluate(weak, strong, target, weight, generator=generator)

    @uncompiled
    def with_losses(
        self,
        weak: Inputs,
        strong: Inputs,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes L_g and the strong views' losses from one pass, so that an unlabeled loss needs no other.

        ``(weight * losses).mean()`` is FixMatch's unlabeled loss. The model runs as in the comparison: BatchNorm's
        statistics are constants, and random layers are off unless ``dropout="on"``. Each loss may get any factor
        afterwards, so both results keep an ordinary graph over all pairs, as with ``fused=False``. `GGCRWrapper`
        knows the factors beforehand and keeps one chunk at a time. The arguments are those of `__call__`; a pair of
        weight 0 is left out, and its loss is 0.

        Returns:
            L_g as in `__call__`, and the losses ``loss_fn(model(strong), target)`` [B]; both are differentiable.

        Raises:
            ConfigError: an option leaves losses out (``max_pairs``), holds the strong views constant, or scales the
                losses (float16), or differentiates statistics; or the engine does not return them.
            GradConsistError: as in `__call__`.
        """
        obstacle = losses_obstacle(self.settings)
        if obstacle is not None:
            raise ConfigError(f"`with_losses` needs the loss of every strong view, but {obstacle}: use `__call__`.")
        found = self._compared(ViewPair(weak, strong, target, weight), generator, None, losses=True)
        return found.loss, found.losses

    @uncompiled
    def blended(self, pair: ViewPair, blend: Blend) -> Compared:
        """Computes ``blend.term * L_g + (blend.losses * losses).sum()`` from one pass, for `GGCRWrapper`."""
        return self._compared(pair, None, None, losses=True, blend=blend)

    @uncompiled
    def evaluate(
        self,
        weak: Inputs,
        strong: Inputs,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        statistics: Constants | None = None,
    ) -> Tensor:
        """Computes L_g like `__call__`, with BatchNorm statistics that you pass in.

        `statistics` are used by BatchNorm calls in batch mode: one list with an entry per BatchNorm call of a forward,
        or a tuple of two such lists, for the weak and the strong views.
        """
        return self._compared(ViewPair(weak, strong, target, weight), generator, statistics).loss

    @uncompiled
    def measure(
        self,
        weak: Inputs,
        strong: Inputs,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        statistics: Constants | None = None,
    ) -> ConsistencyRecord:
        """Measures cosines and norms without a graph, for monitoring; works in any mode, also under ``no_grad``.

        The arguments are those of `__call__` (and `evaluate`); pairs of weight 0 are not compared.

        Returns:
            The record, also kept in `last`.

        Raises:
            GradModeError: called inside a transform or another comparison.
        """
        with one_comparison(), torch.inference_mode(False), torch.no_grad():
            pairs = self._check(weak, strong, target, weight, fused=False)
            if generator is None:  # monitoring must not change the next draws of training
                generator = torch.Generator()
                generator.set_state(self._generator.get_state())
            self.last = compare(self._comparison(generator, statistics, measure=True), pairs).record
        return self.last

    @uncompiled
    def try_on_one_pair(self, pair: ViewPair, statistics: Constants | None = None) -> bool:
        """Evaluates the loss and its gradient on one pair, to find mistakes early.

        The pair is the first one of positive weight, or else the first one, since a method may trust no sample at the
        start. Nothing changes except what is cached about the model. The result tells whether the trial was conclusive:
        numbers that are not finite say nothing about the model.
        """
        with one_comparison():
            pairs = self._check(*pair, fused=self.settings.fused)
            try:
                # A separate generator, so that the next draws of the loss do not change.
                compare(self._comparison(torch.Generator().manual_seed(0), statistics), pairs.first())
            except NonFiniteError:
                return False
        return True

    def _compared(
        self,
        pair: ViewPair,
        generator: torch.Generator | None,
        statistics: Constants | None,
        **wanted: Any,
    ) -> Compared:
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
            raise GradModeError(
                f"{type(self).__name__} was called under {mode}, where no graph can be built: call it outside, or use"
                " `measure(...)`, which needs none."
            )
        with one_comparison():
            options = self._comparison(generator, statistics, **wanted)
            pairs = self._check(*pair, fused=options.fused)
            found = compare(options, pairs)
            self.last = found.record
            self._calls += 1
            self._idle.watch(self.last, pairs.target, self.settings.min_norm, self.criterion)
        return found

    def _check(self, weak: Any, strong: Any, target: Any, weight: Any, *, fused: bool) -> Pairs:
        own = self.settings
        check_model(own.model)
        return check_pairs(own.model, weak, strong, target, weight, default_loss=own.default_loss, fused=fused)

    def _comparison(self, generator: torch.Generator | None, statistics: Constants | None, **wanted: Any) -> Comparison:
        own = self.settings
        if own.batchnorm == "observed" and statistics is None:
            raise ConfigError(
                "`batchnorm='observed'` takes the statistics of the method's own forward: call the loss through"
                " GGCRWrapper, or use `batchnorm='auto'`."
            )
        projection = None if own.projection is None else own.projection.projector(self._calls)
        source = generator or self._generator
        return Comparison(own, self.criterion, source, self._probed, statistics, projection, **wanted)
