"""Models of torchvision and torch.export that are refused; by what they say, core/test_errors holds the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradconsist import GradientConsistencyLoss
from gradconsist.errors import UnsupportedModuleError

ops = pytest.importorskip("torchvision.ops")
IMAGES, TARGET = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8), torch.arange(4) % 3
# Functions that pool a box of each sample's features, and the channels that they leave of 4.
POOLS = {"roi_align": 4, "roi_pool": 4, "ps_roi_align": 1, "ps_roi_pool": 1}


class Deformable(nn.Module):
    """A deformable convolution, as a layer or as a function."""

    def __init__(self, *, layer: bool) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(3, 18, 3, padding=1)
        self.conv = ops.DeformConv2d(3, 4, 3, padding=1) if layer else nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        return self.head(ops.deform_conv2d(x, self.offsets(x), weight, bias, padding=1).mean((2, 3)))


class Pooled(nn.Module):
    def __init__(self, pool: str) -> None:
        super().__init__()
        self.stem, self.head, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(POOLS[pool], 3), getattr(ops, pool)

    def forward(self, x: Tensor) -> Tensor:
        boxes = torch.cat([torch.arange(len(x))[:, None], torch.tensor([[0, 0, 6, 6]]).expand(len(x), 4)], 1).float()
        return self.head(self.pool(torch.tanh(self.stem(x)), boxes, 2).mean((2, 3)))


def _loss(model: nn.Module, **options: Any) -> Tensor:
    return GradientConsistencyLoss(model, **options)(IMAGES, IMAGES.flip(3), TARGET)


def test_a_deformable_convolution_is_refused_with_its_path() -> None:
    model = Deformable(layer=True)
    with pytest.raises(UnsupportedModuleError, match=r"`model\.conv` is a DeformConv2d.*no second derivative"):
        _loss(model)
    model.conv.requires_grad_(False)
    model.offsets.requires_grad_(False)
    assert torch.isfinite(_loss(model))


@pytest.mark.parametrize("engine", ["auto", "loop", "ghost"])
@pytest.mark.parametrize("function", ["deform_conv2d", *POOLS])
def test_functions_without_a_second_derivative_are_refused(function: str, engine: str) -> None:
    model = Deformable(layer=False) if function == "deform_conv2d" else Pooled(function)
    match = f"torchvision without a second derivative: replace it.*double backwards on {function}"
    with pytest.raises(UnsupportedModuleError, match=match):
        _loss(model, engine=engine)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_exported_program_needs_a_dynamic_batch() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 3))
    fixed = torch.export.export(model, (IMAGES,)).module()
    with pytest.raises(UnsupportedModuleError, match=r"only batches of size 4, .*dynamic_shapes="):
        _loss(fixed)
    dynamic = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    torch.testing.assert_close(_loss(dynamic), _loss(model))
