"""What a finished or stopped run of a trainer left, to compare with another one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import load_latest


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from leaves(item, f"{path}.{position}")
    else:
        yield path, value


def unequal(a: Any, b: Any) -> list[str]:
    """Where two nested values differ by a bit; NaN is NaN."""
    x, y = ({path: _bits(leaf) for path, leaf in leaves(value)} for value in (a, b))
    return [path for path in sorted(x.keys() | y.keys()) if x.get(path) != y.get(path)]


def _bits(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    return leaf.dtype, leaf.shape, leaf.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def final(folder: str | Path) -> dict[str, Any]:
    """The last checkpoint, flat, without what may differ: wall clock, and options that change no number."""
    loaded = load_latest(Path(folder) / "checkpoints")
    assert loaded is not None
    flat = dict(leaves(loaded))
    return {key: value for key, value in flat.items() if key != ".seconds" and not key.startswith(".options")}


def differing(a: str | Path, b: str | Path, least: int = 100) -> list[str]:
    """Names of everything that differs between two finished runs, which must have so many entries at least."""
    x, y = final(a), final(b)
    assert len(x) > least
    names = unequal(x, y)
    if (Path(a) / "metrics.jsonl").read_bytes() != (Path(b) / "metrics.jsonl").read_bytes():
        names.append("metrics.jsonl")
    return names


def option(key: str, value: Any) -> list[str]:
    name = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [name if value else name.replace("--", "--no-", 1)]
    return [name, str(value)]
