"""`sharpness` and `top_eigenvalue`: measure how flat the loss is around a model's weights."""

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
        worst: the largest loss along the ascent.
        rho: radius of the ball.
        ascent_steps: number of ascent steps.
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
        """The value worst - loss: never negative, and a lower bound of the true maximum over the ball."""
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
    """Estimates SAM's sharpness: the maximum over ||e|| <= rho of L(w + e) - L(w).

    L is the mean loss of the batch. One ascent step goes to e = rho * g / ||g||, the maximum to first order. Further
    steps are projected gradient ascent: e + rho / 2 * g(w + e) / ||g(w + e)||, projected back into the ball. The
    largest loss along the way counts, so more steps never give less. If the gradient is zero, the ascent does not move.

    BatchNorm's statistics are constants and dropout is off. Put the model in eval mode to measure the deployed network
    (running statistics). In train mode, the statistics of this batch are computed once, at w. So the loss is the one
    whose gradients L_g compares, not that of a training step at w + e, which would compute them again.

    Args:
        model: your model; it does not change.
        inputs: a tensor, or a dict, tuple or list of tensors and constants, batch first.
        target: class indices [B] or probabilities [B, C].
        rho: radius of the ball, over all moved parameters as one flat vector.
        ascent_steps: number of ascent steps.
        parameters: the parameters to move, selected like `encoder` of the loss; None moves every trainable one.
        loss_fn: as for the loss.
        batchnorm: "auto" follows each module's mode; "batch" and "running" force one of the two.
        chunk_size: number of samples at a time; None means all. The result depends on it only by rounding.

    Returns:
        The report.

    Raises:
        ConfigError: an option has an invalid value.
        NonFiniteError: the loss is NaN or infinite, at w or along the way.

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
        value: the eigenvalue, computed as the Rayleigh quotient ⟨v, H v⟩ of its vector.
        residual: ||H v - value v|| / |value| for the unit vector v: an eigenvalue of H lies within residual * |value|.
        steps: number of Hessian-vector products, including the one for the residual.
        tolerance: the requested bound on the residual.
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
    """Computes the largest (not the largest absolute) eigenvalue of the mean loss's Hessian, by Lanczos' method.

    Each step computes one product H v, by differentiating ⟨dL/dw, v⟩, and keeps its vector. So memory grows by one copy
    of the moved parameters per step. The basis is fully orthogonalised, twice. The residual in the report comes from a
    separate product, so it is measured, not estimated by the recurrence.

    The loss, what is constant in it, and all arguments but three are those of `sharpness`: `max_steps` bounds the
    number of Lanczos steps, `tolerance` the residual (float32 reaches about 1e-5), and `seed` draws the start vector.

    Returns:
        The report; ``report.converged`` says whether the tolerance was met. That proves that an eigenvalue lies near
        the value, but not that none is larger: Lanczos may miss one whose vector is nearly absent from the start
        vector.

    Raises:
        ConfigError: an option has an invalid value.
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
    """Returns the Ritz vector of the largest Ritz value, and the number of products."""
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
