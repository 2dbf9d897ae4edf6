"""FixMatch with gradient consistency on several processes, on points that need no download.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py
    torchrun --standalone --nproc-per-node 4 examples/distributed.py --steps 400 --checkpoint run.pt
    python examples/distributed.py                                     # one process, the same global batch

Every process trains on its share of one global batch, so that the number of processes changes the speed and not the
run. The processes' meeting point has no password and, with `--standalone`, too, listens on all addresses of this
machine: whoever can reach it can run code here, so let a firewall keep others out.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradconsist import GGCRWrapper, GradientConsistencyLoss, SSLBatch
from gradconsist.errors import NonFiniteError
from gradconsist.methods import FixMatch
from trainer.launch import Parser, guarded

LABELED, UNLABELED = 12, 48  # of a global batch; both can be dealt to 1, 2, 3, 4, 6 or 12 processes
CENTERS = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])


def share(step: int, rank: int, world: int) -> SSLBatch:
    """This process's rows of the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(3, (LABELED,), generator=generator)
    points = CENTERS[torch.randint(3, (UNLABELED,), generator=generator)]
    noise = torch.randn(LABELED + 3 * UNLABELED, 2, generator=generator).split([LABELED] + 3 * [UNLABELED])
    x, points = CENTERS[y] + 0.7 * noise[0], points + 0.7 * noise[1]
    weak, strong = points + 0.1 * noise[2], points + 0.5 * noise[3]
    mine = slice(rank, None, world)
    return SSLBatch(x[mine], y[mine], weak[mine], strong[mine])


def build(seed: int, rank: int) -> GGCRWrapper:
    """Model, method and term: the same parameters everywhere, a random stream for each process."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))
    torch.manual_seed(seed + 1 + rank)  # from here on; the term takes its seed from torch's when it is made
    consistency = GradientConsistencyLoss(model, encoder=model[0])
    return GGCRWrapper(FixMatch(model, threshold=0.9), consistency, weight=0.1, warmup_steps=20)


def train_step(step: DistributedDataParallel | GGCRWrapper, wrapper: GGCRWrapper, batch: SSLBatch) -> Tensor | None:
    """The loss after its backward; None where any process met a NaN, and then nothing has changed anywhere."""
    before = {name: value for name, value in wrapper.state_dict().items() if name.endswith("_extra_state")}
    loss, failed = None, torch.ones(())
    with suppress(NonFiniteError):
        loss = step(batch).loss
        failed = 1.0 - loss.isfinite().float()
    if dist.is_initialized():
        dist.all_reduce(failed)
    if loss is None or failed > 0:
        wrapper.load_state_dict(before, strict=False)  # the step counters of before, on every process
        return None
    loss.backward()
    return loss.detach()


def save(path: Path, wrapper: GGCRWrapper, optimizer: torch.optim.Optimizer, rank: int, world: int) -> None:
    """One file: what all processes share, and the state of each one's own random draws."""
    draws = [wrapper.consistency.state_dict()] * world
    if dist.is_initialized():
        dist.all_gather_object(draws, wrapper.consistency.state_dict())
    if rank == 0:
        partial = path.with_suffix(".partial")  # a kill while it is written leaves the file before
        torch.save({"wrapper": wrapper.state_dict(), "optimizer": optimizer.state_dict(), "draws": draws}, partial)
        partial.replace(path)


def load(path: Path, wrapper: GGCRWrapper, optimizer: torch.optim.Optimizer, rank: int) -> None:
    """Continues; a process that the file does not know keeps the draws that its seed began."""
    fresh = wrapper.consistency.state_dict()
    state = torch.load(path, weights_only=True)
    wrapper.load_state_dict(state["wrapper"])
    optimizer.load_state_dict(state["optimizer"])
    wrapper.consistency.load_state_dict(state["draws"][rank] if rank < len(state["draws"]) else fresh)


def main() -> int:
    """Train, and print what must not depend on the number of processes."""
    parser = Parser("distributed.py", __doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="file to continue from, if there, and to write at the end")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    wrapper = build(options.seed, rank)
    step: DistributedDataParallel | GGCRWrapper = wrapper
    if world > 1:
        dist.init_process_group("gloo")
        step = DistributedDataParallel(wrapper)  # around the whole step, not around the model
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    if options.checkpoint and options.checkpoint.exists():
        load(options.checkpoint, wrapper, optimizer, rank)
    for number in range(wrapper.step, options.steps):
        optimizer.zero_grad()
        loss = train_step(step, wrapper, share(number, rank, world))
        if loss is not None:
            optimizer.step()
        if rank == 0 and (number + 1) % 50 == 0:
            print(f"step {number + 1:4}: loss of process 0 {'skipped' if loss is None else f'{loss:.4f}'}")
    if options.checkpoint:
        save(options.checkpoint, wrapper, optimizer, rank, world)
    if rank == 0:
        total = sum(float(p.detach().double().abs().sum()) for p in wrapper.parameters())
        print(f"{world} processes, {wrapper.step} steps: sum of |parameters| = {total:.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
