"""What a row of `sweep_derivatives.py` is: a module or function of torch as a layer from [B, *shape] to tensors.

Inputs keep a margin from a row's kinks. What is no function of one sample alone (batch statistics, random draws, a
target for the whole batch) is put so that it is one: in eval mode, with fixed numbers, or with a target a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: how the table names it.
        layer: builds it.
        shape: of one sample's input.
        inputs: "normal", "positive", "spread" (all values of a sample a margin apart, for what sorts or pools).
        kinks: values that inputs keep away from.
        covers: names of torch.nn or torch.nn.functional that a trace of the call does not show.
        random: it draws random numbers, from a seed that it sets itself.
        alone: whether a sample's output is a function of it alone, so that it has a per-sample gradient.
    """

    name: str
    layer: Callable[[], nn.Module]
    shape: Shape = (6,)
    inputs: str = "normal"
    kinks: tuple[float, ...] = ()
    covers: tuple[str, ...] = ()
    random: bool = False
    alone: bool = True


class Fn(nn.Module):
    """A function of the input, of parameters with the given shapes, and of constants."""

    def __init__(self, function: Callable[..., Any], **shapes: Shape) -> None:
        super().__init__()
        self.function = function
        self.own = nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})

    def forward(self, z: Tensor) -> Any:
        return self.function(z, **dict(self.own.items()))


class Around(nn.Module):
    """A module, called in its own way."""

    def __init__(self, inner: nn.Module, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner
        self.function = function

    def forward(self, z: Tensor) -> Any:
        return self.function(self.inner, z)


def module(name: str, build: Callable[[], nn.Module], shape: Shape = (6,), **options: Any) -> Row:
    return Row(f"nn.{name}", build, shape, **options)


def function(
    name: str, call: Callable[..., Any], shape: Shape = (6,), *, row: dict[str, Any] | None = None, **shapes: Shape
) -> Row:
    return Row(name, lambda: Fn(call, **shapes), shape, **(row or {}))


def around(
    name: str, build: Callable[[], nn.Module], call: Callable[[Any, Tensor], Any], shape: Shape, **options: Any
) -> Row:
    return Row(f"nn.{name}", lambda: Around(build(), call), shape, **options)


def labels(z: Tensor, classes: int = 3) -> Tensor:
    """A class for each sample that depends on nothing but its place in the shape."""
    return torch.full((len(z), *z.shape[2:]), 1, dtype=torch.long, device=z.device) % classes


def fixed(z: Tensor, shift: float = 0.0) -> Tensor:
    """Numbers between -1 and 1 of the shape of `z`, the same for each sample."""
    count = z[:1].numel()
    return (
        torch.cos(torch.arange(count, dtype=z.dtype, device=z.device) * 1.7 + shift).reshape(z[:1].shape).expand_as(z)
    )
