"""What the tests of the semi-supervised methods share: data, a network, softmax by hand, and one of each method."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradconsist import SSLBatch
from gradconsist.methods import (
    UDA,
    FixMatch,
    FlexMatch,
    FreeMatch,
    MeanTeacher,
    MixMatch,
    PiModel,
    PseudoLabel,
    SoftMatch,
    TemporalEnsembling,
)

from . import training

SAMPLES, CLASSES = 13, 3
Array = NDArray[np.float64]

# One of each, with options that make its mask, ramp or temperature matter on the data below.
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "fixmatch": lambda model: FixMatch(model, threshold=0.45, unlabeled_ramp_steps=4),
    "flexmatch": lambda model: FlexMatch(model, samples=SAMPLES, threshold=0.5),
    "freematch": lambda model: FreeMatch(model, classes=CLASSES, ema_decay=0.7, fairness_weight=0.3),
    "meanteacher": lambda model: MeanTeacher(model, ema_decay=0.8, unlabeled_ramp_steps=4),
    "mixmatch": lambda model: MixMatch(model, unlabeled_ramp_steps=4),
    "pimodel": lambda model: PiModel(model, unlabeled_ramp_steps=4),
    "pseudolabel": lambda model: PseudoLabel(model, threshold=0.45, unlabeled_ramp_steps=4),
    "softmatch": lambda model: SoftMatch(model, classes=CLASSES, ema_decay=0.7),
    "temporalensembling": lambda model: TemporalEnsembling(
        model, samples=SAMPLES, classes=CLASSES, unlabeled_ramp_steps=4
    ),
    "uda": lambda model: UDA(model, threshold=0.45, annealing="linear", annealing_steps=6),
}


def network(*, dropout: float = 0.0) -> nn.Module:
    """With a steep head, so that confidences lie anywhere between 1 / C and 1."""
    model = training.network(dropout=dropout).double()
    model[-1].weight.data.mul_(6)
    return model


def data(steps: int, *, labeled: int = 4, unlabeled: int = 9) -> list[SSLBatch]:
    """Batches in float64; each sample comes about every other step, sometimes twice in one."""
    generator = torch.Generator().manual_seed(23)
    found = []
    for batch in training.batches(steps, labeled=labeled, unlabeled=unlabeled):
        index = torch.randint(SAMPLES, (unlabeled,), generator=generator)
        x, y, weak, strong = batch
        found.append(SSLBatch(x.double(), y, weak.double(), strong.double(), index))
    return found


def outputs(model: nn.Module, *batches: Tensor) -> list[Tensor]:
    """Logits of inputs that are forwarded together, with their graph, on a copy that keeps its buffers to itself."""
    twin = copy.deepcopy(model)
    for mine, other in zip(twin.parameters(), model.parameters(), strict=True):
        mine.data = other.data  # the same numbers; gradients are the twin's
    return list(twin(torch.cat(batches)).split([len(batch) for batch in batches]))


def arrays(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().numpy() for tensor in tensors]


def softmax(row: Sequence[float] | Array) -> Array:
    """Of one row of logits."""
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return np.array([power / sum(powers) for power in powers])


def softmaxes(rows: Array) -> Array:
    return np.array([softmax(row) for row in rows])


def cross_entropy(rows: Array, labels: Sequence[int] | Tensor) -> list[float]:
    """Of logits and class indices, sample by sample."""
    return [-math.log(softmax(row)[int(label)]) for row, label in zip(rows, labels, strict=True)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def same_state(one: Any, two: Any) -> bool:
    """Bitwise, through dicts."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same_state(one[key], two[key]) for key in one)
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two


# Options whose statistics, counts and histograms matter in several processes.
SHARED: dict[str, Callable[[nn.Module], Any]] = {
    "flexmatch": METHODS["flexmatch"],
    "freematch": METHODS["freematch"],
    "softmatch": METHODS["softmatch"],
    "temporalensembling": METHODS["temporalensembling"],
    "uda": METHODS["uda"],
}


def plain_network() -> nn.Module:
    """Without BatchNorm, whose statistics each process has for itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def share(batch: SSLBatch, rank: int, sizes: Sequence[int]) -> SSLBatch:
    """The rank's labeled inputs (equally many each) and its `sizes[rank]` unlabeled ones."""
    n, first = len(batch.x) // len(sizes), sum(sizes[:rank])
    labeled, unlabeled = slice(rank * n, rank * n + n), slice(first, first + sizes[rank])
    x, y, weak, strong, index = batch
    return SSLBatch(x[labeled], y[labeled], weak[unlabeled], strong[unlabeled], index[unlabeled])


def distributed_run(
    name: str, rank: int | None, sizes: Sequence[int], steps: int, device: str = "cpu"
) -> dict[str, Any]:
    """Steps of SGD by one rank under DDP, or in this process alone on the joined batches (`rank` None)."""
    method = SHARED[name](plain_network().to(device)).train()
    step = method if rank is None else nn.parallel.DistributedDataParallel(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.3)
    gradients, masks = [], []
    for batch in data(steps, labeled=4, unlabeled=sum(sizes)):
        optimizer.zero_grad()
        batch = batch if rank is None else share(batch, rank, sizes)
        out = step(SSLBatch(*(part.to(device) for part in batch)))
        out.loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten().clone() for parameter in method.model.parameters()]))
        masks.append(out.pair.weight.tolist())
        optimizer.step()
    state = {key: value for key, value in method.state_dict().items() if not key.endswith("_extra_state")}
    return {"gradients": gradients, "masks": masks, "state": state}
