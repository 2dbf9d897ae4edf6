"""One training step under every variant that is compared: FixMatch alone, with our term, with BackPACK's.

The plain step is the split FixMatch step: labeled and strong inputs forward and backward, weak inputs forward without
a graph. Its threshold is 0, so that every pair counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/shared"))
from harness import Reference, Row
from models import has_batchnorm, spec
from peers import BackpackTerm, RefusedError

from gradconsist import GGCRWrapper, GradientConsistencyLoss, RandomProjection, SSLBatch, ViewPair
from gradconsist._forward.observer import Observer
from gradconsist.engines import GhostEngine
from gradconsist.methods import FixMatch

WEIGHT = 0.1
PLAIN = "without the term"
JOINT = "without the term, joint forward"


@dataclass(frozen=True)
class Variant:
    """How the term enters the step.

    Attributes:
        kind: "plain", "loss" (`GradientConsistencyLoss` added), "wrapper" (`GGCRWrapper`) or "backpack".
        options: of the loss.
        joint: one forward for all of FixMatch's inputs.
        compared: "encoder", "last block" (of the encoder) or "head".
        share: of the pairs, as `max_pairs`.
        one_pass: whether the wrapper takes the unlabeled loss from the term's pass.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    joint: bool = False
    compared: str = "encoder"
    share: float | None = None
    one_pass: bool = False


def _ghost(chunk: int | None) -> Variant:
    return Variant("loss", {"engine": "ghost", "chunk_size": chunk})


def _vmap(chunk: int | str | None) -> Variant:
    return Variant("loss", {"engine": "vmap", "chunk_size": chunk})


def _projected(dim: int) -> Variant:
    return Variant("loss", {"projection": RandomProjection(dim, resample_every=1)})


VARIANTS: dict[str, Variant] = {
    PLAIN: Variant("plain"),
    "default": Variant("loss"),
    "ghost, chunk 4": _ghost(4),
    "ghost, chunk 7": _ghost(7),
    "ghost, chunk 14": _ghost(14),
    "ghost, chunk 28": _ghost(28),
    "ghost, all pairs": _ghost(None),
    "ghost, form 'gradient'": Variant("loss", {"engine": GhostEngine(form="gradient")}),
    "ghost, form 'gram'": Variant("loss", {"engine": GhostEngine(form="gram")}),
    "vmap, chunk 4": _vmap(4),
    "vmap, chunk 8": _vmap(8),
    "vmap, chunk 16": _vmap(16),
    "vmap, chunk auto": _vmap("auto"),
    "loop": Variant("loss", {"engine": "loop"}),
    "BackPACK, chunk 4": Variant("backpack", {"chunk_size": 4}),
    "BackPACK, chunk 8": Variant("backpack", {"chunk_size": 8}),
    "BackPACK, chunk 16": Variant("backpack", {"chunk_size": 16}),
    "BackPACK, chunk 56": Variant("backpack", {"chunk_size": 56}),
    "default, max_pairs=8": Variant("loss", {"max_pairs": 8}),
    "default, stop_gradient='weak'": Variant("loss", {"stop_gradient": "weak"}),
    "wrapper": Variant("wrapper"),
    "wrapper, one pass": Variant("wrapper", one_pass=True),
    JOINT: Variant("plain", joint=True),
    "wrapper, batchnorm='observed'": Variant("wrapper", {"batchnorm": "observed"}),
    "wrapper, joint forward, batchnorm='observed'": Variant("wrapper", {"batchnorm": "observed"}, joint=True),
}


# The exact term and what is given up for less time or memory, for frontier.py.
FRONTIER: dict[str, Variant] = {
    "exact": Variant("loss"),
    "max_pairs, 1/7 of all": Variant("loss", share=1 / 7),
    "max_pairs, 2/7 of all": Variant("loss", share=2 / 7),
    "max_pairs, 1/2 of all": Variant("loss", share=1 / 2),
    "stop_gradient='weak'": Variant("loss", {"stop_gradient": "weak"}),
    "stop_gradient='strong'": Variant("loss", {"stop_gradient": "strong"}),
    "encoder: last block": Variant("loss", compared="last block"),
    "encoder: head": Variant("loss", compared="head"),
    "kronecker, k=4": _projected(4),
    "kronecker, k=8": _projected(8),
    "kronecker, k=16": _projected(16),
    "kronecker, k=32": _projected(32),
    # What the wrapper makes of the method's own statistics; exact, and cheaper by the forward that takes them.
    "observed": Variant("wrapper", {"batchnorm": "observed"}),
    "observed, max_pairs, 1/7 of all": Variant("wrapper", {"batchnorm": "observed"}, share=1 / 7),
    "observed, max_pairs, 1/14 of all": Variant("wrapper", {"batchnorm": "observed"}, share=1 / 14),
}


def applies(name: str, model: nn.Module) -> bool:
    """Whether a variant says anything new about a model."""
    variant = (VARIANTS | FRONTIER)[name]
    if variant.joint or _observes(variant):  # how the forwards are joined matters to a BatchNorm only
        return has_batchnorm(model)
    return not (variant.kind == "wrapper" and has_batchnorm(model))  # the same step in one pass, without a BatchNorm


def _observes(variant: Variant) -> bool:
    return variant.options.get("batchnorm") == "observed"


def compared(model: Any, which: str) -> nn.Module:
    """The module that a variant compares."""
    if which != "last block":
        module: nn.Module = getattr(model, which)
        return module
    return [module for module in model.modules() if type(module).__name__.endswith("Block")][-1]


def make_batch(
    model_name: str, labeled: int, pairs: int, image_size: int | None = None, device: str = "cpu"
) -> SSLBatch:
    """Random inputs; the strong view is the weak one with noise."""
    shape = spec(model_name).shape(image_size)
    x, weak = torch.randn(labeled, *shape), torch.randn(pairs, *shape)
    strong = weak + 0.5 * torch.randn_like(weak)
    y = torch.randint(10, [labeled])
    return SSLBatch(*(tensor.to(device) for tensor in (x, y, weak, strong)))


class Step:
    """One variant on one model and batch; calling it is one step without the optimizer."""

    def __init__(self, name: str, model: Any, batch: SSLBatch) -> None:
        self.variant = (VARIANTS | FRONTIER)[name]
        self.model, self.batch = model, batch
        self.method = FixMatch(model, threshold=0.0, joint=self.variant.joint)
        options = dict(self.variant.options)
        if self.variant.share is not None:
            options["max_pairs"] = max(1, round(self.variant.share * len(batch.weak)))
        self.term: Any = None
        self.refusal: RefusedError | ImportError | None = None
        if self.variant.kind in ("loss", "wrapper"):
            self.term = GradientConsistencyLoss(model, encoder=compared(model, self.variant.compared), **options)
        if self.variant.kind == "backpack":
            try:
                self.term = BackpackTerm(model, **options)
            except (RefusedError, ImportError) as error:
                self.refusal = error
        self.wrapper = (
            GGCRWrapper(self.method, self.term, weight=WEIGHT, warmup_steps=0, share=self.variant.one_pass)
            if self.variant.kind == "wrapper"
            else None
        )

    def __call__(self) -> None:
        """Forward and backward."""
        if self.refusal is not None:
            raise RefusedError(str(self.refusal)) from self.refusal
        self.model.zero_grad()
        if self.wrapper is not None:
            self.wrapper(self.batch).loss.backward()
            return
        out = self.method(self.batch)
        loss = out.loss
        if self.term is not None:
            loss = loss + WEIGHT * self.term(*out.pair)
        loss.backward()

    def errors(self, reference: Reference) -> Row:
        """Cosine and gradient error of the term; empty for a step without one."""
        if self.term is None:
            return {}
        stop = self.variant.options.get("stop_gradient")
        observed = None if not _observes(self.variant) else "joint" if self.variant.joint else "split"
        return reference.errors(self._term, stop, observed=observed)

    def _term(self, weak: Tensor, strong: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if _observes(self.variant):  # what the wrapper does, but with weights of our own
            with Observer(self.model) as observer:
                self.method(self.batch)
            statistics = observer.observed(ViewPair(weak, strong, target))
            loss = self.term.evaluate(weak, strong, target, weight, statistics=statistics)
        else:
            loss = self.term(weak, strong, target, weight)
        cosine: Tensor = self.term.cosine if self.variant.kind == "backpack" else self.term.last.cosine
        return loss, cosine


def reference_for(model: nn.Module, batch: Any, count: int) -> Reference:
    """The oracle on the first `count` pairs of a batch, with FixMatch's pseudo-labels."""
    with torch.no_grad():
        target = model(batch.weak).argmax(1)
    compared: Callable[[str], bool] = lambda name: name.startswith("encoder.")  # noqa: E731
    return Reference(model, batch.weak, batch.strong, target, count, compared, labeled=batch.x)
