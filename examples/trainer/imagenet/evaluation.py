"""Top-1 and top-5 accuracy over all processes, each photograph counted once."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trainer.errors import TrainerError
from trainer.imagenet.files import Photographs
from trainer.imagenet.views import render, test_view
from trainer.loader import ToModel, init_worker
from trainer.processes import Processes

PROTOCOL = (
    "top-1 accuracy of the averaged (EMA) model in [0, 1] on the images of val/ (or test/), centre crop; "
    "best is chosen on the same images, so it is optimistic"
)
BATCH = 64


class _TestBatches(Dataset[tuple[Tensor, Tensor]]):
    """Every W-th photograph from this process's rank on, in batches: none is skipped, none is padded in."""

    def __init__(self, photographs: Photographs, processes: Processes, size: int) -> None:
        mine = torch.arange(processes.rank, len(photographs), processes.world)
        self.parts, self.photographs = mine.split(BATCH), photographs
        self.view = test_view(size)

    def __len__(self) -> int:
        return len(self.parts) if self.parts[0].numel() else 0

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        part = self.parts[number]
        pixels = [render(self.view, self.photographs.read(index), 0) for index in part.tolist()]
        return torch.from_numpy(np.stack(pixels)), self.photographs.y[part]


@torch.no_grad()
def evaluate(
    model: nn.Module, photographs: Photographs, to_model: ToModel, processes: Processes, *, size: int, workers: int
) -> dict[str, float]:
    """Accuracies and mean cross-entropy over all photographs, the same numbers on every process.

    Args:
        model: In eval mode; made equal to process 0's, whose BatchNorm statistics count.
        photographs: What to classify.
        to_model: Normalisation and device.
        processes: Among whom the photographs are shared.
        size: Side of the images.
        workers: Loader processes.

    Returns:
        `test_accuracy` (top-1), `test_accuracy_top5` and `test_loss`.

    Raises:
        TrainerError: The processes did not see each photograph exactly once.
    """
    processes.copy_from_first(model.state_dict().values())
    batches = DataLoader(
        _TestBatches(photographs, processes, size),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=init_worker if workers else None,
        generator=torch.Generator(),
    )
    top1, top5, loss, count = 0, 0, 0.0, 0
    for pixels, labels in batches:
        target = labels.to(to_model.device)
        logits = model(to_model.images(pixels)).float()
        best = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        top1, top5, count = top1 + int(best[:, 0].sum()), top5 + int(best.sum()), count + len(target)
        loss += float(F.cross_entropy(logits, target, reduction="sum"))
    top1_all, top5_all, loss_all, seen = processes.sum([top1, top5, loss, count])
    if seen != len(photographs):
        raise TrainerError(
            f"evaluation saw {seen:.0f} images of {len(photographs)}: the processes list different files."
        )
    return {"test_accuracy": top1_all / seen, "test_accuracy_top5": top5_all / seen, "test_loss": loss_all / seen}
