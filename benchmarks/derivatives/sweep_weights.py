"""Rows of `sweep_derivatives.py`: weights that are computed from others, and what draws random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sweep_row import Row, around, function, module
from torch import Tensor, nn
from torch.nn.utils import parametrizations


def rows() -> Iterator[Row]:
    conv = lambda: nn.Conv2d(2, 3, 2)
    yield Row("parametrizations.weight_norm(Linear)", lambda: parametrizations.weight_norm(nn.Linear(6, 4)))
    yield Row(
        "parametrizations.weight_norm(Linear, dim=1)", lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=1)
    )
    yield Row(
        "parametrizations.weight_norm(Linear, dim=None)",
        lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=None),
    )
    yield Row("parametrizations.weight_norm(Conv2d)", lambda: parametrizations.weight_norm(conv()), (2, 3, 3))
    yield Row(
        "parametrizations.weight_norm(Conv2d, dim=1)", lambda: parametrizations.weight_norm(conv(), dim=1), (2, 3, 3)
    )
    yield function("torch._weight_norm", lambda z, v, g: z @ torch._weight_norm(v, g, 0).T, v=(4, 6), g=(4, 1))
    yield function("torch._weight_norm(dim=1)", lambda z, v, g: z @ torch._weight_norm(v, g, 1).T, v=(4, 6), g=(1, 6))
    yield function(
        "torch._weight_norm of the input",
        lambda z, g: torch.stack([torch._weight_norm(one, g, 0) for one in z]),
        (2, 3),
        g=(2, 1),
    )
    yield function(
        "torch._weight_norm_interface",
        lambda z, v, g: z @ torch._weight_norm_interface(v, g, 0)[0].T,
        v=(4, 6),
        g=(4, 1),
    )
    yield Row(
        "parametrizations.spectral_norm(Linear), eval", lambda: parametrizations.spectral_norm(nn.Linear(6, 4)).eval()
    )
    yield Row(
        "parametrizations.spectral_norm(Conv2d), eval", lambda: parametrizations.spectral_norm(conv()).eval(), (2, 3, 3)
    )
    for name in ("matrix_exp", "cayley", "householder"):
        for size in ((3, 3), (4, 3)):
            if name == "householder" or size == (3, 3):
                build = lambda name=name, size=size: parametrizations.orthogonal(nn.Linear(*size), orthogonal_map=name)
                yield Row(f"parametrizations.orthogonal({name}, {size[1]}x{size[0]})", build, (size[0],))


def random_rows() -> Iterator[Row]:
    """What draws random numbers: the draw is fixed by a seed, which vmap does not see."""
    for name in ("Dropout", "AlphaDropout", "FeatureAlphaDropout", "Dropout1d", "Dropout2d", "Dropout3d", "RReLU"):
        shape = {
            "Dropout1d": (3, 4),
            "Dropout2d": (3, 2, 2),
            "Dropout3d": (3, 2, 2, 1),
            "FeatureAlphaDropout": (3, 2, 2),
        }.get(name, (6,))

        def seeded(m: Any, z: Tensor) -> Tensor:
            if m.training:  # no draw is left when the library has switched it off
                torch.manual_seed(0)
            return m(z.square() + z)

        yield around(f"{name}, train", getattr(nn, name), seeded, shape, random=True, kinks=(0, -1))
        yield module(f"{name}, eval", lambda name=name: getattr(nn, name)().eval(), shape, kinks=(0,))

    def gumbel(z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return F.gumbel_softmax(z, dim=1)

    yield function("F.gumbel_softmax", gumbel, row={"random": True})
