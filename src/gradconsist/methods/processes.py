"""Gathers statistics over all processes of a job; in a single process, it returns them unchanged.

Gather only in train mode: evaluation often runs on one rank alone, which would wait for the others forever.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from gradconsist._refusals.models import process_count


def gather(rows: Tensor) -> Tensor:
    """Collects the rows [k, ...] of all processes, in the order of ranks, without graph; k may differ among them."""
    rows = rows.detach()
    if process_count() == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(process_count())]
    distributed.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def last_rows(index: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct entries of an index [k], and the last position of each in it, [j] both.

    With repeated entries, ``memory[index] = value`` alone does not say which value stays.
    """
    entries, place = torch.unique(index, return_inverse=True)
    positions = torch.arange(len(index), device=index.device)
    first = torch.zeros_like(entries)
    return entries, first.scatter_reduce(0, place, positions, "amax", include_self=True)
