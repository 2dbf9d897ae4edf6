"""Rows of `sweep_derivatives.py`: losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sweep_row import Row, around, fixed, function, labels
from torch import Tensor, nn


def rows() -> Iterator[Row]:
    """All rows of this file."""
    yield from _losses_of_classes()
    yield from _losses_of_pairs()


def _losses_of_classes() -> Iterator[Row]:
    for name, options in (("", {}), (", smoothing", {"label_smoothing": 0.1}), (", weight", {"weight": True})):

        def build(options: dict[str, Any] = options) -> nn.Module:
            if "weight" in options:
                return nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]), reduction="none")
            return nn.CrossEntropyLoss(reduction="none", **options)

        yield around(f"CrossEntropyLoss(classes{name})", build, lambda m, z: m(z, labels(z)), (3,))
        yield around(f"CrossEntropyLoss(probabilities{name})", build, lambda m, z: m(z, fixed(z).softmax(1)), (3,))
        yield around(f"CrossEntropyLoss(pixels{name})", build, lambda m, z: m(z, labels(z)), (3, 2, 2))
    yield around(
        "CrossEntropyLoss(soft target with a graph)",
        lambda: nn.CrossEntropyLoss(reduction="none"),
        lambda m, z: m(z, z.sin().softmax(1)),
        (3,),
    )
    for reduction in ("mean", "sum"):
        yield around(
            f"CrossEntropyLoss({reduction})",
            lambda reduction=reduction: nn.CrossEntropyLoss(reduction=reduction),
            lambda m, z: torch.stack([m(one[None], labels(one[None])) for one in z]),
            (3,),
        )
    if hasattr(nn, "LinearCrossEntropyLoss"):
        yield around(
            "LinearCrossEntropyLoss",
            lambda: nn.LinearCrossEntropyLoss(4, 3, reduction="none"),
            lambda m, z: m(z, torch.ones_like(z[:, 0], dtype=torch.long)),
            (4,),
        )
    yield around("NLLLoss", lambda: nn.NLLLoss(reduction="none"), lambda m, z: m(z, labels(z)), (3,))
    yield around(
        "NLLLoss(pixels)",
        lambda: nn.NLLLoss(reduction="none"),
        lambda m, z: m(z, labels(z)),
        (3, 2, 2),
        covers=("nn.NLLLoss2d",),
    )
    yield around(
        "AdaptiveLogSoftmaxWithLoss",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 5, [2, 4]),
        lambda m, z: m.log_prob(z),
        (4,),
    )
    yield around("MultiMarginLoss", lambda: nn.MultiMarginLoss(reduction="none"), lambda m, z: m(z, labels(z)), (3,))
    yield around(
        "MultiMarginLoss(p=2)", lambda: nn.MultiMarginLoss(2, reduction="none"), lambda m, z: m(z, labels(z)), (3,)
    )
    yield around(
        "MultiLabelMarginLoss",
        lambda: nn.MultiLabelMarginLoss(reduction="none"),
        lambda m, z: m(z, torch.tensor([1, 0, -1], device=z.device).expand(len(z), 3)),
        (3,),
    )
    yield around(
        "MultiLabelSoftMarginLoss",
        lambda: nn.MultiLabelSoftMarginLoss(reduction="none"),
        lambda m, z: m(z, (fixed(z) > 0).to(z.dtype)),
        (3,),
    )
    for blank in (0, 2):

        def ctc(m: Any, z: Tensor) -> Tensor:
            lengths = torch.full((len(z),), z.shape[1], dtype=torch.long), torch.full((len(z),), 2, dtype=torch.long)
            return m(
                z.log_softmax(2).transpose(0, 1), torch.ones(len(z), 2, dtype=torch.long, device=z.device), *lengths
            )

        yield around(f"CTCLoss(blank={blank})", lambda blank=blank: nn.CTCLoss(blank, reduction="none"), ctc, (5, 3))


def _losses_of_pairs() -> Iterator[Row]:
    """Losses of an input and fixed numbers, and of two parts of the input."""
    none = {"reduction": "none"}
    for name, options, kinks in (
        ("MSELoss", {}, ()),
        ("L1Loss", {}, ()),
        ("SmoothL1Loss", {"beta": 0.7}, ()),
        ("HuberLoss", {"delta": 0.6}, ()),
        ("SoftMarginLoss", {}, ()),
        ("PoissonNLLLoss", {}, ()),
        ("PoissonNLLLoss", {"full": True}, ()),
        ("BCEWithLogitsLoss", {}, ()),
        ("HingeEmbeddingLoss", {"margin": 1.3}, (0, 1.3)),
    ):
        target = (
            (lambda z: (fixed(z) > 0).to(z.dtype) * 2 - 1)
            if "Margin" in name or "Hinge" in name
            else lambda z: fixed(z).abs() + 0.1
        )
        kind = getattr(nn, name)
        text = ", ".join(f"{key}={value}" for key, value in options.items())
        yield around(
            f"{name}({text})",
            lambda kind=kind, options=options: kind(**options, **none),
            lambda m, z, target=target: m(z, target(z)),
            (6,),
            kinks=kinks,
        )
    yield function("F.mse_loss, both with a graph", lambda z: F.mse_loss(z[:, :3], z[:, 3:].sin(), reduction="none"))
    yield function(
        "F.smooth_l1_loss, both with a graph", lambda z: F.smooth_l1_loss(z[:, :3], z[:, 3:].sin(), reduction="none")
    )
    yield function(
        "F.huber_loss, both with a graph", lambda z: F.huber_loss(z[:, :3], z[:, 3:].sin(), reduction="none")
    )
    yield function("F.l1_loss, both with a graph", lambda z: F.l1_loss(z[:, :3], z[:, 3:].sin(), reduction="none"))
    yield function(
        "F.binary_cross_entropy_with_logits(weights)",
        lambda z, p: F.binary_cross_entropy_with_logits(
            z, p.sigmoid().expand_as(z), fixed(z).exp(), reduction="none", pos_weight=fixed(z)[0].cos()
        ),
        p=(6,),
    )
    yield around("BCELoss", lambda: nn.BCELoss(**none), lambda m, z: m(z.sigmoid(), fixed(z).abs()), (6,))
    yield function(
        "F.binary_cross_entropy, target with a graph",
        lambda z: F.binary_cross_entropy(z[:, :3].sigmoid(), z[:, 3:].sigmoid(), reduction="none"),
    )
    for log in (False, True):
        yield around(
            f"KLDivLoss(log_target={log})",
            lambda log=log: nn.KLDivLoss(log_target=log, **none),
            lambda m, z, log=log: m(z[:, :3].log_softmax(1), z[:, 3:].log_softmax(1) if log else z[:, 3:].softmax(1)),
            (6,),
        )
    yield around(
        "GaussianNLLLoss",
        lambda: nn.GaussianNLLLoss(**none),
        lambda m, z: m(z[:, :3], fixed(z[:, :3]), z[:, 3:].exp()),
        (6,),
    )
    yield around(
        "GaussianNLLLoss(full)",
        lambda: nn.GaussianNLLLoss(full=True, **none),
        lambda m, z: m(z[:, :3], fixed(z[:, :3]), z[:, 3:].exp()),
        (6,),
    )
    one = lambda z, sign: torch.full((len(z),), sign, dtype=z.dtype, device=z.device)
    for sign in (1.0, -1.0):
        yield around(
            f"CosineEmbeddingLoss({sign:g})",
            lambda: nn.CosineEmbeddingLoss(-1.0, **none),
            lambda m, z, sign=sign: m(z[:, :3], z[:, 3:], one(z, sign)),
            (6,),
        )
        yield around(
            f"MarginRankingLoss({sign:g})",
            lambda: nn.MarginRankingLoss(9.0, **none),
            lambda m, z, sign=sign: m(z[:, 0].square(), z[:, 1], one(z, sign)),
            (2,),
        )
    yield around("CosineSimilarity", nn.CosineSimilarity, lambda m, z: m(z[:, :3], z[:, 3:]), (6,))
    for p in (1.0, 2.0, 3.0):
        yield around(
            f"PairwiseDistance(p={p:g})", lambda p=p: nn.PairwiseDistance(p), lambda m, z: m(z[:, :3], z[:, 3:]), (6,)
        )
        yield around(
            f"TripletMarginLoss(p={p:g})",
            lambda p=p: nn.TripletMarginLoss(5.0, p, **none),
            lambda m, z: m(z[:, :2], z[:, 2:4], z[:, 4:]),
            (6,),
        )
    yield around(
        "TripletMarginLoss(swap)",
        lambda: nn.TripletMarginLoss(5.0, swap=True, **none),
        lambda m, z: m(z[:, :2], z[:, 2:4], z[:, 4:]),
        (6,),
    )
    yield around(
        "TripletMarginWithDistanceLoss",
        lambda: nn.TripletMarginWithDistanceLoss(margin=5.0, **none),
        lambda m, z: m(z[:, :2], z[:, 2:4], z[:, 4:]),
        (6,),
    )
    for p in (1.0, 2.0, 3.0, float("inf")):
        yield function(
            f"torch.cdist(p={p:g})", lambda z, c, p=p: torch.cdist(z, c.expand(len(z), 2, 3), p=p), (2, 3), c=(2, 3)
        )
    yield function("F.pdist", lambda z: torch.stack([F.pdist(one) for one in z]), (3, 2), row={"covers": ("F.pdist",)})
