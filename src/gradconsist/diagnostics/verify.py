"""`verify`: tests the gradient of L_g on your own model, since a list of torch's wrong derivatives goes stale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradconsist._forward.batchnorm import Statistics
from gradconsist._inputs.batch import check_inputs, doubled, map_members
from gradconsist._inputs.options import check_count, check_number
from gradconsist.diagnostics.landscape import landscape
from gradconsist.diagnostics.same_loss import double_of, statistics_here
from gradconsist.errors import GradConsistError, InputValueError
from gradconsist.loss import GradientConsistencyLoss
from gradconsist.types import ConsistencyRecord, GradProducts, Inputs

_STEPS = (1e-4, 1e-5, 1e-6)
_FLOOR = 1e-9  # L_g and losses are of order 1: below this, both derivatives are rounding


@dataclass(frozen=True)
class DirectionError:
    """Both derivatives of L_g along one direction v in parameter space.

    Attributes:
        name: "all parameters", or the name of the only parameter that the direction moves.
        analytic: ⟨dL_g/dtheta, v⟩.
        numeric: (L_g(theta + h v) - L_g(theta - h v)) / 2 h, at the step size with the smallest error.
        errors: |analytic - numeric| per step size h, relative to the typical size of ⟨dL_g/dtheta, v⟩ for a random v.
    """

    name: str
    analytic: float
    numeric: float
    errors: Mapping[float, float]

    @property
    def error(self) -> float:
        """The error at the best step size: curvature spoils large steps, rounding small ones, and kinks some."""
        return min(self.errors.values())


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        directions: one entry per random direction.
        suspects: parameters whose own derivative disagrees; only filled if a direction failed.
        tolerance: bound on the relative error.
        value_error: largest relative difference between the loss's cosines and norms and those of the loop engine; 0
            with ``dropout="on"``, where engines draw different masks.
        stopped: suspects for which the mean loss itself has another derivative than differences show: a gradient is
            stopped or replaced, so this test cannot tell whether L_g is right.
    """

    directions: list[DirectionError] = field(repr=False)
    suspects: list[DirectionError] = field(repr=False)
    tolerance: float
    value_error: float = 0.0
    stopped: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The largest relative error over the directions."""
        return max(direction.error for direction in self.directions)

    @property
    def ok(self) -> bool:
        """Whether every direction is within the tolerance, and so are the values."""
        return self.worst <= self.tolerance and self.value_error <= self.tolerance

    def __str__(self) -> str:
        wrong = [entry.name for entry in self.suspects if entry.name not in self.stopped]
        verdict = "DISAGREES with" if wrong or not self.stopped else "is NOT TESTED by"
        verdict = "agrees with" if self.worst <= self.tolerance else verdict
        lines = []
        if self.value_error > self.tolerance:
            lines.append(
                f"the engine's cosines or norms DISAGREE with those of engine='loop' by {self.value_error:.1e}: its"
                " products, or the rule of a layer (`register_rule`), are wrong"
            )
        lines += [
            f"gradient of L_g {verdict} finite differences: worst relative error {self.worst:.1e} over"
            f" {len(self.directions)} directions (tolerance {self.tolerance:.0e})"
        ]
        for entry in [*self.directions, *self.suspects]:
            by_step = ", ".join(f"h={h:.0e}: {error:.1e}" for h, error in entry.errors.items())
            lines.append(f"  {entry.name}: analytic {entry.analytic:+.6e}, numeric {entry.numeric:+.6e} ({by_step})")
        if self.stopped:
            lines.append(
                f"  the mean loss itself has another derivative for {', '.join(self.stopped)}: a gradient is stopped or"
                " replaced there (`.detach()`, `no_grad`, straight-through, `padding_idx`), which differences cannot"
                " follow, or a custom backward is wrong"
            )
        if wrong:
            lines.append(f"  an operator that uses {', '.join(wrong)} has a wrong second derivative, or a kink there")
        return "\n".join(lines)


def verify(
    consistency: GradientConsistencyLoss,
    weak: Inputs,
    strong: Inputs,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    directions: int = 4,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> VerifyReport:
    """Tests the gradient of a loss on its own model by directional finite differences in float64.

    The gradient needs torch's second derivatives of every operator in the model, some of which have been silently
    wrong; the differences need first derivatives only. For random directions v, scaled per tensor to the norm of the
    parameter, it compares

        ⟨dL_g/dtheta, v⟩    with    (L_g(theta + h v) - L_g(theta - h v)) / (2 h),    h = 1e-4, 1e-5, 1e-6

    on a float64 copy of the model. BatchNorm's statistics stay at their values in theta, or are computed at each point
    if the gradient goes through them. With ``dropout="on"``, all evaluations draw the same numbers. If a direction
    fails, each parameter is tested alone, and the report names those that disagree. A wrong value with the right
    derivative would pass this test, so cosines and norms are compared with those of ``engine="loop"``. Differences
    do not follow a stopped gradient (``.detach()``, a straight-through estimator): the test fails there, and the report
    says so.

    It costs about ``2 + 6 * directions`` evaluations of L_g, and ``6`` more per parameter tensor after a failure. A
    handful of pairs is enough. A model with kinks (ReLU, max-pooling) may fail at some step sizes; only the smallest
    error counts.

    The loss has the options that you train with, and a `loss_fn` that works in float64; `weak`, `strong`, `target` and
    `weight` are those of a call. All pairs are compared and both views differentiated, regardless of `max_pairs` and
    `stop_gradient`. ``batchnorm="observed"`` is tried with joint statistics. `directions` is the number of random
    directions, drawn by `seed`, and `tolerance` the bound on the relative error.

    Returns:
        The report; ``report.ok`` is the verdict, ``print(report)`` shows the evidence.

    Raises:
        ConfigError: an option is out of range, or `consistency` is not a GradientConsistencyLoss.
        InputValueError: no pair is left to compare, or all are degenerate.
    """
    check_count("directions", directions)
    check_number("tolerance", tolerance, least=1e-12)
    loss = double_of(consistency, reduction="sum", fused=True)
    weak, strong = (map_members(doubled, check_inputs(*view)) for view in (("weak", weak), ("strong", strong)))
    loss._probed.report_only = True  # show with numbers what the loss itself would refuse
    trial = _Trial(loss, weak, strong, doubled(target), weight)
    generator = torch.Generator().manual_seed(seed)
    tested = [trial.test("all parameters", trial.parameters, generator) for _ in range(directions)]
    suspects: list[DirectionError] = []
    if not all(entry.error <= tolerance for entry in tested):  # NaN, too
        alone = [trial.test(name, {name: p}, generator) for name, p in trial.parameters.items()]
        suspects = [entry for entry in alone if not entry.error <= tolerance]
    stopped = trial.stopped([entry.name for entry in suspects], tolerance, generator) if suspects else ()
    return VerifyReport(tested, suspects, tolerance, trial.value_error, stopped)


def _against_differences(
    at: Callable[[float], float], analytic: float, usual: float
) -> tuple[dict[float, float], dict[float, float]]:
    """Returns the central differences of `at` by step, and the relative error of `analytic` against each."""
    numeric = {h: (at(h) - at(-h)) / (2 * h) for h in _STEPS}
    # A derivative that is wrongly zero must show too, so the numeric value also sets the scale.
    return numeric, {h: abs(analytic - value) / max(abs(value), usual, _FLOOR) for h, value in numeric.items()}


class _Trial:
    """Evaluates L_g around one point, with the statistics of that point unless its gradient goes through them."""

    def __init__(self, loss: GradientConsistencyLoss, *arguments: Any) -> None:
        self._loss = loss
        self._arguments = arguments
        self._statistics: list[Statistics] | None = None
        record = self._measure()  # also checks the arguments
        reference = loss.with_options(engine="loop").measure(*arguments, generator=_same_draws())
        self.value_error = 0.0 if loss.settings.dropout == "on" else _difference(record, reference)
        if not bool((record.compared & ~record.degenerate).any()):
            raise InputValueError("no pair has a cosine: give pairs of positive weight whose gradients do not vanish.")
        if not loss.settings.through_statistics:
            self._statistics = statistics_here(loss, arguments[0], arguments[1])
        loss.evaluate(*arguments, statistics=self._statistics, generator=_same_draws()).backward()
        loss._calls = 0  # with a projection, use the matrices of that call again
        named = dict(loss.settings.model.named_parameters())
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        self._gradient = {  # none for a parameter that the forward does not use
            name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone()
            for name, p in self.parameters.items()
        }
        self._weight = arguments[3]
        self._padding = {
            id(module.weight): module.padding_idx
            for module in loss.settings.model.modules()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None
        }

    def test(self, name: str, moved: Mapping[str, Tensor], generator: torch.Generator) -> DirectionError:
        """Computes both derivatives along a random direction in the parameters `moved`."""
        v = {key: self._direction(parameter, generator) for key, parameter in moved.items()}
        analytic = sum(float((self._gradient[key] * v[key]).sum()) for key in v)
        # The typical size of ⟨g, v⟩ for a random v: if ⟨g, v⟩ is near zero by chance, rounding must not look large.
        usual = sum(float(self._gradient[k].square().sum() * v[k].square().sum()) / v[k].numel() for k in v) ** 0.5
        numeric, errors = _against_differences(lambda h: self._value(v, h), analytic, usual)
        best = min(errors, key=lambda h: errors[h])
        return DirectionError(name, analytic, numeric[best], errors)

    def stopped(self, names: Sequence[str], tolerance: float, generator: torch.Generator) -> tuple[str, ...]:
        """Returns the parameters for which even the mean loss of the weak views has another derivative."""
        own, (weak, _, target, _) = self._loss.settings, self._arguments
        loss_fn = None if own.default_loss else own.loss_fn
        found = []
        try:
            with landscape(
                own.model, weak, target, parameters=None, loss_fn=loss_fn, batchnorm=own.batchnorm, chunk_size=None
            ) as here:
                gradient = here.gradient(here.weights)
                for name in names:
                    parts = {key: torch.zeros_like(p) for key, p in self.parameters.items()}
                    parts[name] = self._direction(self.parameters[name], generator)
                    v = torch.cat([part.flatten() for part in parts.values()])
                    usual = float((gradient * (v != 0)).norm() * v.norm()) / parts[name].numel() ** 0.5
                    at = lambda h, v=v: here.value(here.weights + h * v)  # noqa: E731
                    _, errors = _against_differences(at, float(gradient @ v), usual)
                    if not min(errors.values()) <= tolerance:
                        found.append(name)
        except GradConsistError:  # a model that the loss itself refuses
            return ()
        return tuple(found)

    def _direction(self, parameter: Tensor, generator: torch.Generator) -> Tensor:
        """Draws a random direction with the norm of the parameter (norm 1 if the parameter is zero)."""
        v = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype).to(parameter.device)
        if id(parameter) in self._padding:
            v[self._padding[id(parameter)]] = 0  # the padding row is used, but has no gradient by definition
        scale = float(parameter.detach().norm()) or 1.0
        return v * (scale / max(float(v.norm()), 1e-30))

    @torch.no_grad()
    def _value(self, v: Mapping[str, Tensor], h: float) -> float:
        """Computes L_g at theta + h v."""
        before = {key: self.parameters[key].clone() for key in v}
        try:
            for key, direction in v.items():
                self.parameters[key].add_(direction, alpha=h)
            record = self._measure()
        finally:
            for key, value in before.items():
                self.parameters[key].copy_(value)
        w, s, cosine = record.norm_weak, record.norm_strong, record.cosine.nan_to_num(0.0)
        products = GradProducts(w.square(), s.square(), cosine * w * s)
        terms = self._loss.criterion.terms(products, cosine, record.degenerate)
        if self._weight is not None:
            terms = terms * self._weight
        return float(terms[record.compared].sum())

    def _measure(self) -> ConsistencyRecord:
        return self._loss.measure(*self._arguments, statistics=self._statistics, generator=_same_draws())


def _difference(record: ConsistencyRecord, reference: ConsistencyRecord) -> float:
    """Returns the largest difference of cosines, or relative difference of norms; pairs without a number have none."""
    worst = [(record.cosine - reference.cosine).abs()]
    for own, right in ((record.norm_weak, reference.norm_weak), (record.norm_strong, reference.norm_strong)):
        worst.append((own - right).abs() / right.clamp(min=1e-30))
    return float(torch.cat(worst).nan_to_num(0.0).max())


def _same_draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)
