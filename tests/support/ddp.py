"""What several processes compute, and what it must equal.

`train(rank, world, spec)` is one rank's run of DDP(GGCRWrapper(FixMatch(model), GradientConsistencyLoss(model))).
`judge(spec)` is the gradient of the first step on the joined batch, from FixMatch written out by hand and the float64
oracle: no code of the library. `alone(spec)` is the library's run in one process on the joined batches.

Names: n labeled and m unlabeled samples of a rank, W ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch, StepOutput
from gradconsist.errors import GradConsistError
from gradconsist.methods import FixMatch

from . import models
from .oracle import Judge

CLASSES = 3
THRESHOLD = 0.36  # some pairs pass, some do not


class Convolutional(nn.Module):
    """Convolution, BatchNorm and a head; `frozen` puts BatchNorm in eval mode for good."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Linear(12, CLASSES)
        self.frozen = frozen
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.1, 0.1)
            self.norm.running_var.uniform_(0.5, 1.5)

    def train(self, mode: bool = True) -> Convolutional:
        super().train(mode)
        if self.frozen:
            self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:  # [B, 5]
        return self.head(torch.tanh(self.norm(self.stem(x[:, None]))).flatten(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)),
    "dropout": lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, CLASSES)),
    "batchnorm in eval mode": lambda: Convolutional(frozen=True),
    "batchnorm": lambda: Convolutional(frozen=False),
    "checkpointed": models.checkpointed,
    "reused layer": models.reused,
    "layer without use": lambda: models.Layers(
        lambda m, x: m.head(m.stem(x).tanh()), stem=nn.Linear(5, 6), spare=nn.Linear(2, 2), head=nn.Linear(6, CLASSES)
    ),
}


@dataclass(frozen=True)
class Spec:
    """One experiment.

    Attributes:
        world: W.
        model: a key of `MODELS`.
        labeled: n of each rank; one number for all of them.
        unlabeled: m of each rank; likewise.
        empty: ranks whose confidence mask is empty.
        share: how a rank weights its losses where sizes differ: "none"; "loss" multiplies the whole loss by
            W n / sum n, for ranks that all have the same n : m; "parts" multiplies the unlabeled parts by W m / sum m.
        loss: options of GradientConsistencyLoss.
        wrapper: options of GGCRWrapper.
        method: options of FixMatch.
        ddp: options of DistributedDataParallel.
        steps: optimizer steps.
        accumulate: batches of a step, all but the last under ``no_sync``.
        rank_seeds: the ranks' losses draw from different seeds.
        lr: of SGD.
        first: number of the first batch, for a run that continues.
        start: state_dicts of the wrapper to continue from, rank by rank; one serves all.
    """

    world: int = 2
    model: str = "mlp"
    labeled: int | tuple[int, ...] = 3
    unlabeled: int | tuple[int, ...] = 4
    empty: tuple[int, ...] = ()
    share: str = "none"
    loss: dict[str, Any] = field(default_factory=dict)
    wrapper: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    accumulate: int = 1
    rank_seeds: bool = False
    lr: float = 0.1
    first: int = 0
    start: tuple[dict[str, Any], ...] = ()

    def sizes(self, rank: int) -> tuple[int, int]:
        return tuple(n if isinstance(n, int) else n[rank] for n in (self.labeled, self.unlabeled))

    def factors(self, rank: int) -> tuple[float, float]:
        """Of the labeled and of the unlabeled part: W n / sum n and W m / sum m."""
        n, m = self.sizes(rank)
        all_n, all_m = (sum(self.sizes(r)[i] for r in range(self.world)) for i in (0, 1))
        return self.world * n / all_n, self.world * m / all_m


def batch(spec: Spec, rank: int, number: int) -> SSLBatch:
    """The rank's batch of a number; a sample's values do not depend on the number of ranks where sizes are equal."""
    generator = torch.Generator().manual_seed(1000 * number)
    sizes = [spec.sizes(r) for r in range(spec.world)]
    all_n, all_m = (sum(size[i] for size in sizes) for i in (0, 1))
    draw = lambda n: torch.randn(n, 5, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weak, noise = draw(all_n), draw(all_m), draw(all_m)
    y = torch.randint(CLASSES, (all_n,), generator=generator)
    before_n, before_m = (sum(size[i] for size in sizes[:rank]) for i in (0, 1))
    n, m = slice(before_n, before_n + sizes[rank][0]), slice(before_m, before_m + sizes[rank][1])
    return SSLBatch(x[n], y[n], weak[m], (weak + 0.7 * noise)[m])


def joined(spec: Spec, number: int) -> SSLBatch:
    """All ranks' batches as one."""
    parts = [batch(spec, rank, number) for rank in range(spec.world)]
    return SSLBatch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("x", "y", "weak", "strong")))


def build(spec: Spec, rank: int = 0) -> GGCRWrapper:
    """A rank's wrapper: the model from one seed, the loss's generator from one or from the rank's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[spec.model]().double()
        torch.manual_seed(rank if spec.rank_seeds else 0)
        method = FixMatch(model, **{"threshold": THRESHOLD, **spec.method})
        consistency = GradientConsistencyLoss(model, **spec.loss)
    wrapper = GGCRWrapper(method, consistency, **{"weight": 0.5, "warmup_steps": 0, **spec.wrapper})
    if spec.start:
        wrapper.load_state_dict(spec.start[rank % len(spec.start)])
    return wrapper.train()


def train(rank: int, world: int, spec: Spec, plain: bool = False) -> dict[str, Any]:
    """One rank's run; `plain` is DDP around the method alone."""
    torch.manual_seed(100 + rank)  # dropout in the method's own forward
    wrapper = build(spec, rank)
    if rank in spec.empty:
        wrapper.method.threshold = 1.0  # no softmax of finite logits is more
    whole, unlabeled = 1.0, 1.0
    if spec.share == "loss":
        whole = spec.factors(rank)[0]
    elif spec.share == "parts":
        unlabeled = spec.factors(rank)[1]
    wrapper.weight *= unlabeled
    wrapper.method.unlabeled_weight *= unlabeled
    inner = wrapper.method if plain else wrapper
    ddp = DistributedDataParallel(inner, **spec.ddp)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=spec.lr)
    result: dict[str, Any] = {"compared": [], "weights": []}
    number = spec.first
    for step in range(spec.steps):
        optimizer.zero_grad()
        for part in range(spec.accumulate):
            last = part == spec.accumulate - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                out: StepOutput = ddp(batch(spec, rank, number))
                (whole * out.loss / spec.accumulate).backward()
            number += 1
            result["weights"].append(out.logs.get("ggcr_weight"))
            if not plain and wrapper.consistency.last is not None:
                result["compared"].append(wrapper.consistency.last.compared.tolist())
        if step == 0:
            result["gradient"] = gradients(wrapper)
        optimizer.step()
    result["parameters"] = {name: p.detach().clone() for name, p in wrapper.named_parameters()}
    result["buffers"] = {name: b.detach().clone() for name, b in wrapper.named_buffers()}
    result["state"] = wrapper.state_dict()
    result["step"] = wrapper.step
    return result


def attempt(rank: int, world: int, spec: Spec) -> dict[str, Any] | str:
    """`train`, or the name of the refusal."""
    try:
        return train(rank, world, spec)
    except GradConsistError as refusal:
        return type(refusal).__name__


def gradients(wrapper: GGCRWrapper) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in wrapper.named_parameters()}


def alone(spec: Spec) -> dict[str, Any]:
    """The library in one process on the joined batches, where every rank is alike."""
    wrapper = build(spec)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=spec.lr)
    result: dict[str, Any] = {}
    number = spec.first
    for step in range(spec.steps):
        optimizer.zero_grad()
        for _ in range(spec.accumulate):
            (wrapper(joined(spec, number)).loss / spec.accumulate).backward()
            number += 1
        if step == 0:
            result["gradient"] = gradients(wrapper)
        optimizer.step()
    result["parameters"] = {name: p.detach().clone() for name, p in wrapper.named_parameters()}
    result["step"] = wrapper.step
    return result


def judge(spec: Spec, ranks: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Gradient of the first step's loss on the joined batch of `ranks` (all of them), by hand and by the oracle."""
    ranks = range(spec.world) if ranks is None else ranks
    wrapper = build(spec)
    model = wrapper.method.model
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for number in range(spec.first, spec.first + spec.accumulate):
        batches = [batch(spec, rank, number) for rank in ranks]
        x, y, weak, strong = (torch.cat(parts) for parts in zip(*(b[:4] for b in batches), strict=True))
        limits = [1.0 if rank in spec.empty else THRESHOLD for rank in ranks]
        threshold = torch.cat([torch.full((len(b.weak),), limit) for b, limit in zip(batches, limits, strict=True)])
        joint = spec.method.get("joint", True)
        weak_logits = model(torch.cat([x, weak, strong]))[len(x) : -len(strong)] if joint else model(weak)
        others = model(torch.cat([x, weak, strong] if joint else [x, strong]))
        confidence, label = torch.softmax(weak_logits.detach(), 1).max(1)
        mask = (confidence >= threshold).double()
        unsupervised = (mask * F.cross_entropy(others[-len(strong) :], label, reduction="none")).mean()
        base = F.cross_entropy(others[: len(x)], y) + unsupervised
        first = torch.autograd.grad(base, parameters, allow_unused=True, materialize_grads=True)
        second = Judge(model, weak, strong, label, mask).verdict().gradient.values()
        weight = float(spec.wrapper.get("weight", 0.5))
        for entry, g, h in zip(total, first, second, strict=True):
            entry += (g + weight * h) / spec.accumulate
    return {name: g for (name, _), g in zip(wrapper.named_parameters(), total, strict=True)}


def mean(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What DDP makes of the ranks' gradients."""
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def error(found: dict[str, Tensor | None], expected: dict[str, Tensor]) -> float:
    """|found - expected| / |expected| over all parameters as one vector; no gradient counts as zero."""
    pairs = [(torch.zeros_like(g) if found[name] is None else found[name], g) for name, g in expected.items()]
    difference = torch.cat([(a - b).reshape(-1) for a, b in pairs])
    return float(difference.norm() / torch.cat([b.reshape(-1) for _, b in pairs]).norm())


def gradient_cases(world: int) -> dict[str, Spec]:
    """Experiments whose first gradient equals that of one process on the joined batch."""
    last = world - 1
    small = tuple(range(1, world + 1))
    return {
        "as it is": Spec(world),
        "find_unused_parameters": Spec(world, ddp={"find_unused_parameters": True}),
        "static_graph": Spec(world, ddp={"static_graph": True}),
        "gradient_as_bucket_view": Spec(world, ddp={"gradient_as_bucket_view": True}),
        "buckets of 100 bytes": Spec(world, ddp={"bucket_cap_mb": 1e-4}),
        "no_sync": Spec(world, accumulate=3),
        "empty mask on the first rank": Spec(world, empty=(0,)),
        "empty mask on the last rank": Spec(world, empty=(last,)),
        "empty mask on every rank": Spec(world, empty=tuple(range(world))),
        "empty mask, static_graph": Spec(world, empty=(last,), ddp={"static_graph": True}),
        "uneven, one ratio": Spec(
            world, labeled=tuple(2 * n for n in small), unlabeled=tuple(3 * n for n in small), share="loss"
        ),
        "uneven, unlabeled only": Spec(world, unlabeled=tuple(2 * n for n in small), share="parts"),
        "two forwards": Spec(world, method={"joint": False}),
        "BatchNorm in eval mode": Spec(world, model="batchnorm in eval mode"),
        "checkpointed": Spec(world, model="checkpointed", loss={"engine": "auto"}),
        "checkpointed, static_graph": Spec(
            world, model="checkpointed", loss={"engine": "auto"}, ddp={"static_graph": True}
        ),
        "reused layer": Spec(world, model="reused layer"),
        "layer without use": Spec(world, model="layer without use", ddp={"find_unused_parameters": True}),
    }
