"""One of two processes with a CUDA device each: `rank_program.py RANK FOLDER`."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist.methods import FixMatch
from support import methods
from support.simulated_gpu import SimulatedGPU

SIZES, STEPS = (4, 4), 2


def term(rank: int | None, device: str) -> Any:
    """Gradients of FixMatch with the term, by one rank under DDP, or alone on the joined batches (`rank` None)."""
    model = methods.plain_network().to(device)
    gc = GradientConsistencyLoss(model)
    wrapper = GGCRWrapper(FixMatch(model, threshold=0.4), gc, weight=0.5, warmup_steps=0, gate="all")
    step = wrapper if rank is None else nn.parallel.DistributedDataParallel(wrapper)
    found = []
    for batch in methods.data(STEPS, labeled=4, unlabeled=sum(SIZES)):
        mine = batch if rank is None else methods.share(batch, rank, SIZES)
        wrapper.zero_grad()
        step(SSLBatch(*(part.to(device) for part in mine))).loss.backward()
        found.append(torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()]).cpu())
    return found


def main(rank: int, folder: Path) -> None:
    """The term in a group for both devices; then everything in one that only CUDA tensors may use."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=60)

    def join(backend: str, name: str) -> None:
        dist.init_process_group(backend, init_method=f"file://{folder / name}", rank=rank, world_size=2, timeout=limit)

    join("cpu:gloo,cuda:gloo", "both")
    result: dict[str, Any] = {"term": term(rank, "cuda")}
    dist.destroy_process_group()

    join("cuda:gloo", "cuda")  # as with "nccl"
    result["term of a CUDA group"] = term(rank, "cuda")
    runs = {name: methods.distributed_run(name, rank, SIZES, STEPS, "cuda") for name in methods.SHARED}
    result["runs"] = {name: run["gradients"] for name, run in runs.items()}
    try:
        dist.all_reduce(torch.ones(1))
        result["refused"] = ""
    except RuntimeError as error:
        result["refused"] = str(error)
    dist.destroy_process_group()
    torch.save(result, folder / f"{rank}.pt")


if __name__ == "__main__":
    with SimulatedGPU() if "SIMULATED_GPU" in os.environ else nullcontext():
        main(int(sys.argv[1]), Path(sys.argv[2]))
