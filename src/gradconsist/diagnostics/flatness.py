"""`sharpness` and `top_eigenvalue`: how flat the loss is around a model's weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from gradconsist._inputs.options import check_count, check_number
from gradconsist._inputs.parameters import Encoder
from gradconsist.diagnostics.landscape import Landscape, landscape
from gradconsist.errors import NonFiniteError
from gradconsist.types import Inputs, LossFunction


@dataclass(frozen=True)
class SharpnessReport:
    """What `sharpness` found.

    Attributes:
        loss: L(w).
        worst: the largest loss that the ascent met.
        rho: radius of the ball.
        ascent_steps: number of ascent steps; 1 is SAM's own.
        gradient_norm: ||dL/dw||.
        path: the loss after every ascent step.
    """

    loss: float
    worst: float
    rho: float
    ascent_steps: int
    gradient_norm: float
    path: tuple[float, ...] = field(repr=False)

    @property
    def sharpness(self) -> float:
        """Worst - loss, never negative: a lower bound of the ball's true maximum."""
        return self.worst - self.loss

    def __str__(self) -> str:
        way = "one ascent step (SAM's)" if self.ascent_steps == 1 else f"{self.ascent_steps} ascent steps"
        return f"sharpness {self.sharpness:.4g} at rho={self.rho:g}, by {way}: loss {self.loss:.4g} to {self.worst:.4g}"


def sharpness(
    model: nn.Module,
    inputs: Inputs,
    target: Tensor,
    *,
    rho: float = 0.05,
    ascent_steps: int = 1,
    parameters: Encoder = None,
    loss_fn: LossFunction | None = None,
    batchnorm: Literal["auto", "batch", "running"] = "auto",
    chunk_size: int | None = None,
) -> SharpnessReport:
    """SAM's sharpness: max over ||e|| <= rho of L(w + e) - L(w), about.

    L is the mean loss of the batch. One ascent step goes to e = rho * g / ||g||, the maximum to first order. Further
    ones are projected gradient ascent: e + rho / 2 * g(w + e) / ||g(w + e)||, drawn back into the ball. The largest
    loss on the way counts, so more steps never give less. Where the gradient is zero the ascent stands still.

    BatchNorm's statistics are constants and dropout is off. Put the model in eval mode for the network as it is
    deployed (running statistics); in train mode those of this batch are taken once, at w, so that the loss is the one
    whose gradients L_g compares, and not the one of a training step at w + e, which would take them anew.

    Args:
        model: the user's model; it stays untouched.
        inputs: a tensor, or a dict, tuple or list of tensors, batch first, and constants.
        target: class indices [B] or probabilities [B, C].
        rho: radius of the ball, over all moved parameters as one flat vector.
        ascent_steps: number of ascent steps.
        parameters: what is moved, as `encoder` of the loss; None is every trainable parameter.
        loss_fn: as for the loss.
        batchnorm: "auto" follows each module's mode, "batch" and "running" force one.
        chunk_size: samples at a time; None is all. The result does not depend on it beyond rounding.

    Returns:
        The report.

    Raises:
        ConfigError: an option has no such value.
        NonFiniteError: the loss is NaN or infinite, here or on the way.

    Source: Foret et al., ICLR 2021, eq. (2) and the definition above it.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 3)
        >>> print(sharpness(model, torch.randn(8, 4), torch.randint(3, [8])))
        sharpness 0.02561 at rho=0.05, by one ascent step (SAM's): loss 0.9661 to 0.9918
    """
    check_number("rho", rho, least=0.0)
    check_count("ascent_steps", ascent_steps)
    with landscape(
        model, inputs, target, parameters=parameters, loss_fn=loss_fn, batchnorm=batchnorm, chunk_size=chunk_size
    ) as here:
        loss, gradient = here.value(here.weights), here.gradient(here.weights)
        norm = float(gradient.norm())
        path, offset = [], torch.zeros_like(gradient)
        for step in range(ascent_steps):
            length = float(gradient.norm())
            if length > 0:
                offset = offset + (rho if step == 0 else rho / 2) / length * gradient
                offset = offset * min(1.0, rho / max(float(offset.norm()), 1e-30))
            path.append(here.value(here.weights + offset))
            if step + 1 < ascent_steps:
                gradient = here.gradient(here.weights + offset)
    return SharpnessReport(loss, max([loss, *path]), rho, ascent_steps, norm, tuple(path))


@dataclass(frozen=True)
class EigenvalueReport:
    """What `top_eigenvalue` found.

    Attributes:
        value: the eigenvalue, as the Rayleigh quotient ⟨v, H v⟩ of its vector.
        residual: ||H v - value v|| / |value| for the unit vector v: an eigenvalue of H lies within residual * |value|.
        steps: Hessian-vector products that were taken, the residual's included.
        tolerance: bound on the residual that was asked for.
        vector: v, flat, in the order of the moved parameters.
    """

    value: float
    residual: float
    steps: int
    tolerance: float
    vector: Tensor = field(repr=False)

    @property
    def converged(self) -> bool:
        """Whether the residual is within the tolerance."""
        return self.residual <= self.tolerance

    def __str__(self) -> str:
        verdict = "converged" if self.converged else "NOT CONVERGED"
        return f"top eigenvalue {self.value:.4g}, {verdict}: residual {self.residual:.1e} after {self.steps} products"


def top_eigenvalue(
    model: nn.Module,
    inputs: Inputs,
    target: Tensor,
    *,
    max_steps: int = 60,
    tolerance: float = 1e-3,
    seed: int = 0,
    parameters: Encoder = None,
    loss_fn: LossFunction | None = None,
    batchnorm: Literal["auto", "batch", "running"] = "auto",
    chunk_size: int | None = None,
) -> EigenvalueReport:
    """The largest (not the largest absolute) eigenvalue of the Hessian of the mean loss, by Lanczos' method.

    Each step takes one product H v, by differentiating ⟨dL/dw, v⟩, and keeps its vector: memory grows by one copy of
    the moved parameters a step. The basis is orthogonalised in full, twice. The residual in the report is computed from
    a product of its own, so it is a fact and not the recurrence's estimate. The loss, and what is constant in it, is
    that of `sharpness`.

    Args:
        model: the user's model; it stays untouched.
        inputs: as for `sharpness`.
        target: as for `sharpness`.
        max_steps: most Lanczos steps.
        tolerance: on the residual; float32 reaches about 1e-5.
        seed: of the random start vector.
        parameters: what is moved, as `encoder` of the loss; None is every trainable parameter.
        loss_fn: as for the loss.
        batchnorm: as for `sharpness`.
        chunk_size: samples at a time; None is all.

    Returns:
        The report; ``report.converged`` says whether the tolerance was met. That proves an eigenvalue near the value,
        not that none is larger: one whose vector the start hardly holds may be missed.

    Raises:
        ConfigError: an option has no such value.
        UnsupportedModuleError: a function in the model has no second derivative.

    Source: Golub and Van Loan, "Matrix Computations", 4th edition, sections 10.1 and 10.3.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 3)
        >>> report = top_eigenvalue(model, torch.randn(8, 4), torch.randint(3, [8]))
        >>> f"{report.value:.3f}", report.converged
        ('0.803', True)
    """
    check_count("max_steps", max_steps)
    check_number("tolerance", tolerance, least=1e-12)
    with landscape(
        model, inputs, target, parameters=parameters, loss_fn=loss_fn, batchnorm=batchnorm, chunk_size=chunk_size
    ) as here:
        vector, steps = _lanczos(here, max_steps, tolerance, torch.Generator().manual_seed(seed))
        image = here.hessian_product(vector)
    value = float(vector @ image)
    error = float((image - value * vector).norm())
    residual = error / abs(value) if value else error
    return EigenvalueReport(value, residual, steps + 1, tolerance, vector)


_LEAST_STEPS = 10  # products: an eigenvalue that is found at once need not be the largest


def _lanczos(here: Landscape, max_steps: int, tolerance: float, generator: torch.Generator) -> tuple[Tensor, int]:
    """The Ritz vector of the largest Ritz value, and the number of products taken."""
    start = torch.randn(here.weights.shape, generator=generator).to(here.weights)
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off: list[float] = []
    while True:
        image = here.hessian_product(basis[-1])
        if not bool(torch.isfinite(image).all()):
            raise NonFiniteError(
                "a product with the Hessian is NaN or infinite: `inputs`, the weights or the loss have such entries."
            )
        diagonal.append(float(image @ basis[-1]))
        for _ in range(2):  # once is not enough in floating point
            for known in basis:
                image = image - (known @ image) * known
        off.append(float(image.norm()))
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        small += torch.diag(torch.tensor(off[:-1], dtype=torch.float64), 1)
        values, vectors = torch.linalg.eigh(small + small.triu(1).T)
        size = float(values.abs().max())
        # |H v - value v| of the Ritz vector is the last off-diagonal entry times its last coefficient.
        done = off[-1] * abs(float(vectors[-1, -1])) <= 0.5 * tolerance * abs(float(values[-1]))
        done = done and len(basis) >= _LEAST_STEPS
        if done or off[-1] <= 1e-12 * size or len(basis) in (max_steps, len(start)):
            found = torch.zeros_like(start)
            for part, known in zip(vectors[:, -1].tolist(), basis, strict=True):
                found += part * known
            return found / found.norm(), len(basis)
        basis.append(image / off[-1])
