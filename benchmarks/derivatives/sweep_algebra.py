"""Rows of `sweep_derivatives.py`: linear algebra."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sweep_row import Row, function


def rows() -> Iterator[Row]:
    """All rows of this file."""
    square = lambda z: z + 3 * torch.eye(3, dtype=z.dtype, device=z.device)
    positive = lambda z: z @ z.mT + torch.eye(3, dtype=z.dtype, device=z.device)
    calls = {
        "inv": lambda z: torch.linalg.inv(square(z)),
        "det, slogdet": lambda z: (torch.linalg.det(square(z)), torch.linalg.slogdet(square(z)).logabsdet),
        "solve": lambda z: torch.linalg.solve(square(z), z.sin()),
        "solve_triangular": lambda z: torch.linalg.solve_triangular(square(z).triu(), z.sin(), upper=True),
        "cholesky": lambda z: torch.linalg.cholesky(positive(z)),
        "cholesky_solve": lambda z: torch.cholesky_solve(z.sin(), torch.linalg.cholesky(positive(z))),
        "eigvalsh": lambda z: torch.linalg.eigvalsh(z + z.mT),
        "eigh (projector)": lambda z: (lambda v: v[..., :1] @ v[..., :1].mT)(torch.linalg.eigh(z + z.mT).eigenvectors),
        "svdvals": lambda z: torch.linalg.svdvals(z),
        "qr": lambda z: torch.linalg.qr(square(z)),
        "lu_factor": lambda z: torch.linalg.lu_factor(square(z))[0],
        "pinv": lambda z: torch.linalg.pinv(square(z)),
        "lstsq": lambda z: torch.linalg.lstsq(square(z), z.sin()).solution,
        "matrix_exp": lambda z: torch.linalg.matrix_exp(z),
        "matrix_power": lambda z: torch.linalg.matrix_power(z, 3),
        "matrix_norm": lambda z: (
            torch.linalg.matrix_norm(z),
            torch.linalg.matrix_norm(z, 2),
            torch.linalg.matrix_norm(z, "nuc"),
        ),
        "multi_dot": lambda z: torch.stack([torch.linalg.multi_dot([one, one.mT, one]) for one in z]),
        "householder_product": lambda z: torch.linalg.householder_product(z, z[..., 0].sigmoid()),
        "ldl, tensorinv": lambda z: torch.linalg.inv_ex(square(z))[0],
    }
    for name, call in calls.items():
        yield function(f"torch.linalg.{name}", call, (3, 3))
