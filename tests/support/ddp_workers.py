"""What single ranks do in the tests of several processes, beyond `ddp.train`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from gradconsist import GGCRWrapper, GradientConsistencyLoss, StepOutput, ViewPair
from gradconsist.errors import NonFiniteError, UnsupportedModuleError

from . import ddp, methods
from .oracle import Judge


def ready(rank: int, world: int) -> int:
    return rank


def silent(rank: int, world: int) -> None:
    """The last rank stays away from a collective operation."""
    if rank < world - 1:
        torch.distributed.all_reduce(torch.zeros(1))
    time.sleep(60)


def dying(rank: int, world: int) -> None:
    if rank == world - 1:
        os._exit(3)
    time.sleep(60)


def failing(rank: int, world: int) -> None:
    if rank == world - 1:
        raise ValueError("seen in a test")
    time.sleep(60)


def one_has_nan(rank: int, world: int, folder: str) -> None:
    """For `torch.multiprocessing`: a step in which the last rank's data is broken; the others wait for it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    spec = ddp.Spec(world)
    step = DistributedDataParallel(ddp.build(spec))
    batch = ddp.batch(spec, rank, 0)
    if rank == world - 1:
        batch.strong.fill_(torch.nan)
    try:
        step(batch).loss.backward()
    except RuntimeError as error:
        if rank == world - 1:
            raise
        Path(folder, f"rank {rank}").write_text(str(error))  # the connection is gone
        time.sleep(60)  # whoever started the processes ends this one


def skip_together(rank: int, world: int, spec: ddp.Spec, broken: int) -> dict[str, Any]:
    """Batch `broken` holds NaN on the last rank: all ranks agree to skip it, as docs/guides/distributed.md shows."""
    step = DistributedDataParallel(ddp.build(spec))
    optimizer = torch.optim.SGD(step.parameters(), lr=spec.lr)
    skipped = []
    for number in range(spec.steps):
        batch = ddp.batch(spec, rank, number)
        if rank == world - 1 and number == broken:
            batch.strong[0, 0] = torch.nan
        optimizer.zero_grad()
        counters = step.module.step, step.module.method.step
        try:
            loss = step(batch).loss
            failed = 1.0 - loss.isfinite().float()
        except NonFiniteError:
            failed = torch.tensor(1.0)
        torch.distributed.all_reduce(failed)
        if failed > 0:
            step.module.step, step.module.method.step = counters
            skipped.append(number)
            continue
        loss.backward()
        optimizer.step()
    parameters = {name: p.detach().clone() for name, p in step.module.named_parameters()}
    return {"parameters": parameters, "skipped": skipped, "steps": (step.module.step, step.module.method.step)}


def joined_ranks(rank: int, world: int, spec: ddp.Spec, batches: tuple[int, ...]) -> list[dict[str, Tensor | None]]:
    """Gradients of each step, the ranks having different numbers of batches, under DDP's own `join`."""
    step = DistributedDataParallel(ddp.build(spec))
    found = []
    with Join([step]):
        for number in range(batches[rank]):
            step.zero_grad()
            step(ddp.batch(spec, rank, number)).loss.backward()
            found.append(ddp.gradients(step.module))
    return found


def synchronized_batchnorm(rank: int, world: int) -> str:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(ddp.Convolutional(frozen=False))
    try:
        GradientConsistencyLoss(model)
    except UnsupportedModuleError as error:
        return str(error)
    return "accepted"


class TermOnly(nn.Module):
    """A step whose loss is L_g alone, so that the last bias, which the gradients of `stem` do not see, has no part."""

    def __init__(self, model: nn.Module, weight: float) -> None:
        super().__init__()
        self.model, self.weight = model, weight

    def forward(self, batch: Any) -> StepOutput:
        target = torch.arange(len(batch.weak)) % ddp.CLASSES
        pair = ViewPair(batch.weak, batch.strong, target, torch.full((len(target),), self.weight))
        return StepOutput(torch.zeros((), dtype=torch.float64), pair)


def linear_loss(output: Tensor, target: Tensor) -> Tensor:
    return output.gather(1, target[:, None])[:, 0]


def bias_model(rank: int, world: int, spec: ddp.Spec, form: str, fused: bool, unused: bool) -> Any:
    """Gradients of pytorch issue 47562's case: of the wrapper's form, or of the one that the issue is about."""
    model = ddp.build(spec).method.model
    consistency = GradientConsistencyLoss(model, encoder=model[0], loss_fn=linear_loss, fused=fused, **spec.loss)
    method = TermOnly(model, float(rank not in spec.empty))
    wrapper = GGCRWrapper(method, consistency, weight=1.0, warmup_steps=0)
    batch = ddp.batch(spec, rank, 0)
    if form == "wrapper":
        outer = DistributedDataParallel(wrapper, find_unused_parameters=unused)
        outer(batch).loss.backward()
    else:
        outer = DistributedDataParallel(model, find_unused_parameters=unused)
        outer(batch.weak)  # DDP looks for unused parameters from here, where the bias is used
        pair = method(batch).pair
        consistency(*pair).backward()
    return ddp.gradients(wrapper)


def judge_bias_model(spec: ddp.Spec) -> dict[str, Tensor]:
    wrapper, whole = ddp.build(spec), ddp.joined(spec, 0)
    target = torch.cat([torch.arange(spec.sizes(rank)[1]) % ddp.CLASSES for rank in range(spec.world)])
    weight = torch.cat(
        [torch.full((spec.sizes(rank)[1],), float(rank not in spec.empty)) for rank in range(spec.world)]
    )
    compared = lambda name: name.startswith("0.")  # noqa: E731
    model = wrapper.method.model
    verdict = Judge(model, whole.weak, whole.strong, target, weight, compared=compared, loss_fn=linear_loss).verdict()
    return {f"method.model.{name}": g for name, g in verdict.gradient.items()}


def methods_state(rank: int, world: int, name: str, sizes: tuple[int, ...], steps: int) -> dict[str, Any]:
    """A semi-supervised method under DDP: gradients of each step averaged by it, and the state at the end."""
    return methods.distributed_run(name, rank, sizes, steps)
