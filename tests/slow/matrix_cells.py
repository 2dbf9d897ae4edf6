"""One cell of the matrix: a model, an engine and a precision against the float64 oracle of the tests.

Five quantities a call: the cosine of each pair, L_g, its derivative for the parameters, the norms, and its derivative
for the inputs (which the library offers with `fused=False`, and refuses by name otherwise).
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from gradconsist import GradientConsistencyLoss, RandomProjection
from gradconsist.engines import Engine, GhostEngine
from gradconsist.errors import GradConsistError
from support import compare
from support.layer_zoo import LAYER_CASES
from support.operator_zoo import OPERATOR_CASES
from support.oracle import Verdict, tree_leaves
from support.whole_models import WHOLE_CASES
from support.zoo import CASES, Case, Problem

ENGINES: dict[str, Callable[[], str | Engine]] = {
    "auto": lambda: "auto",
    "loop": lambda: "loop",
    "vmap": lambda: "vmap",
    "ghost": lambda: "ghost",
    "ghost, gradient form": lambda: GhostEngine(form="gradient"),
    "ghost, gram form": lambda: GhostEngine(form="gram"),
    "ghost, projected": lambda: "ghost",
}
PROJECTIONS = {"ghost, projected": RandomProjection(2)}  # by engine; all others compare whole gradients
QUANTITIES = ("cosine", "loss", "gradient", "norms", "inputs")


@dataclass(frozen=True)
class Precision:
    """What a column computes in, and its bounds.

    Attributes:
        dtype: of parameters and inputs.
        bounds: absolute on the cosine; relative, in norm, on everything else.
        autocast: of the forward, or None.
        factor: times the error of the oracle in the same precision, where the bounds are missed (half precision:
            always), what an engine may be off.
        floor: added to that on cosine and gradients, a few units in the last place: the oracle's error is one draw of
            rounding noise.
        direction: half precision has no bound on the gradient but this one, on its direction (1 - cosine).
        unit: the rounding error of one operation.
    """

    dtype: torch.dtype
    bounds: tuple[float, float]
    autocast: torch.dtype | None = None
    factor: float = 0.0
    floor: tuple[float, float] = (0.0, 0.0)
    direction: float = math.inf
    unit: float = 0.0

    def bound(self, quantity: str) -> float:
        """The bound of the contract on one quantity's error."""
        return {"cosine": self.bounds[0], "loss": 2 * self.bounds[0], "direction": self.direction}.get(
            quantity, self.bounds[1]
        )

    def allowance(self, quantity: str, own: float) -> float:
        """What an engine may be off where the oracle in the same precision is off by `own`."""
        if quantity in ("gradient", "norms", "inputs") and own >= 1.0:
            return math.inf  # noise: not one digit of the oracle is right either, so its size says nothing
        if quantity == "direction":
            return self.factor**2 * own + self.floor[1] ** 2  # about half the square of the relative error
        return self.factor * own + {"cosine": self.floor[0], "loss": 2 * self.floor[0]}.get(quantity, self.floor[1])


_HALF: dict[str, Any] = {"dtype": torch.float32, "factor": 2.0}
PRECISIONS = {
    "float64": Precision(torch.float64, compare.TOLERANCE[torch.float64]),
    "float32": Precision(torch.float32, compare.TOLERANCE[torch.float32], factor=3.0, unit=2.0**-24),
    "bfloat16 autocast": Precision(
        bounds=(2e-2, math.inf), autocast=torch.bfloat16, floor=(4e-3, 2e-2), direction=1e-2, unit=2.0**-9, **_HALF
    ),
    "float16 autocast": Precision(
        bounds=(5e-3, math.inf), autocast=torch.float16, floor=(5e-4, 2.5e-3), direction=1e-3, unit=2.0**-12, **_HALF
    ),
}
DRAWS = 8  # of the oracle's rounding noise at most, where one does not explain an error
_FLOAT16_SCALE = 1.0  # of the oracle: 1024 keeps first derivatives from underflow, and loses the second ones

Setting = tuple[bool, "int | str | None", bool]  # fused, chunk_size, whether the inputs require grad


def settings(engine: str, precision: Precision, *, whole: bool, quick: bool) -> list[Setting]:
    """The calls of a cell: `fused` and chunks in full precision, where errors show; elsewhere one that gives all."""
    if engine == "auto":
        return [(True, "auto", False)]
    if precision.dtype != torch.float64 or (whole and engine != "ghost"):
        return [(False, 2, True)]
    if quick or whole:
        return [(True, 1, False), (False, 2, True)]
    if "," in engine:  # forms and projections differ in the products of layers only
        return [(True, 1, False), (False, None, True)]
    return [(True, 1, False), (True, None, False), (False, 3, True), (False, None, False)]


@dataclass
class Cell:
    """What became of one cell.

    Attributes:
        verdict: "pass" inside the bounds; "dtype" beyond them, but within the allowance beside the oracle in the same
            precision; "refused" by name; "xfail" for a known bug of torch; else "wrong".
        calls: how many.
        errors: worst of each quantity.
        own: those of the oracle in the same precision, where it was asked.
        reason: class and beginning of the message of a refusal, or what is wrong.
    """

    verdict: str
    calls: int
    errors: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    reason: str = ""


class References:
    """The oracle's answers for one model, computed when asked for."""

    def __init__(self, case: Case, pairs: int) -> None:
        self.case, self.pairs = case, pairs
        self.exact = functools.cache(self._exact)
        self.same = functools.cache(self._same)

    def problem(self, dtype: torch.dtype) -> Problem:
        """A fresh model with its views."""
        return self.case.problem(dtype=dtype, pairs=self.pairs)

    def _exact(self, dtype: torch.dtype, projection: RandomProjection | None = None) -> Verdict:
        problem = self.problem(dtype)
        options = {"sketch": _sketch(problem, projection)}
        try:
            return problem.judge(inputs=True, **options).verdict()
        except RuntimeError:  # a forward that writes into its input
            return self.problem(dtype).judge(**options).verdict()

    def _same(self, name: str, draw: int, projection: RandomProjection | None = None) -> dict[str, float] | str:
        """Errors of the oracle in the precision `name`, or what torch said.

        Draws after the first are of the same problem with parameters and inputs changed by a rounding error: where a
        model has a kink that close (a ReLU at almost 0), all of them together show how far its derivative jumps.
        """
        precision = PRECISIONS[name]
        problem, exact = self.problem(precision.dtype), self.exact(precision.dtype, projection)
        if draw:
            generator = torch.Generator().manual_seed(draw)
            tensors = [*problem.model.parameters(), *(x for view in problem.views[:2] for x in tree_leaves(view))]
            with torch.no_grad():
                for x in tensors:
                    if x.is_floating_point():
                        x.mul_(1 + precision.unit * torch.randn(x.shape, generator=generator))
        scale = _FLOAT16_SCALE if precision.autocast == torch.float16 else 1.0
        try:
            judge = problem.judge(
                dtype=precision.dtype, autocast=precision.autocast, scale=scale, inputs=bool(exact.inputs),
                sketch=_sketch(problem, projection),
            )  # fmt: skip
            same = judge.verdict()
        except RuntimeError as error:
            return _said(error)
        found = _errors(same, exact)
        return {key: math.inf if math.isnan(value) else value for key, value in found.items()}


def _sketch(problem: Problem, projection: RandomProjection | None) -> Callable[[Tensor], Tensor] | None:
    """What becomes of a per-sample gradient [P]: L G R^T of each weight that is projected, one behind the other."""
    if projection is None:
        return None
    projector, encoder = projection.projector(), problem.case.encoder or (lambda _: True)
    shapes = [p.shape for name, p in problem.model.named_parameters() if p.requires_grad and encoder(name)]

    def sketch(gradient: Tensor) -> Tensor:
        parts, start = [], 0
        for shape in shapes:
            part = gradient[start : start + shape.numel()]
            if projector.shrinks(shape):
                left, right = projector.factors(shape, start, gradient.dtype, gradient.device)
                part = (left @ part.reshape(shape[0], -1) @ right.T).flatten()
            parts.append(part)
            start += shape.numel()
        return torch.cat(parts)

    return sketch


def _errors(found: Verdict, exact: Verdict) -> dict[str, float]:
    """Every quantity's error; those that `found` has not are left out."""
    errors = {
        "cosine": compare.cosine_error(found.cosine, exact.cosine),
        "loss": float((found.loss.double() - exact.loss).abs().max() / (exact.loss.abs().max() + 1.0)),
        "gradient": compare.relative(found.flat, exact.flat),
        "norms": max(
            compare.relative(found.norm_weak, exact.norm_weak), compare.relative(found.norm_strong, exact.norm_strong)
        ),
        "direction": 1.0 - float(torch.nn.functional.cosine_similarity(found.flat, exact.flat, 0, 0.0)),
    }
    if found.inputs and exact.inputs:
        mine, reference = (torch.cat([x.reshape(-1).double() for x in v.inputs]) for v in (found, exact))
        errors["inputs"] = compare.relative(mine, reference)
    return errors


def _call(problem: Problem, engine: str, precision: Precision, setting: Setting) -> Verdict:
    """One call of the library, as the oracle would say it."""
    fused, chunk_size, with_inputs = setting
    case = problem.case
    floating = [x for view in problem.views[:2] for x in tree_leaves(view) if x.is_floating_point()]
    if with_inputs:
        for x in floating:
            x.requires_grad_()
    gc = GradientConsistencyLoss(
        problem.model,
        encoder=case.encoder,
        loss_fn=case.loss_fn,
        engine=ENGINES[engine](),
        projection=PROJECTIONS.get(engine),
        fused=fused,
        chunk_size=chunk_size,  # type: ignore[arg-type]
    )
    half = contextlib.nullcontext()
    if precision.autocast is not None:
        half = torch.autocast("cpu", dtype=precision.autocast)  # type: ignore[assignment]
    with half:
        loss = gc(*problem.views)
    loss.backward()
    record, zero = gc.last, torch.zeros_like
    gradient = {
        n: zero(p) if p.grad is None else p.grad for n, p in problem.model.named_parameters() if p.requires_grad
    }
    inputs: tuple[Tensor, ...] = ()
    if with_inputs:
        inputs = tuple(zero(x) if x.grad is None else x.grad for x in floating)
    return Verdict(
        record.cosine, record.norm_weak, record.norm_strong, record.degenerate, loss.detach(), gradient, inputs
    )


def measure(references: References, engine: str, name: str, *, quick: bool = False, refused: bool = False) -> Cell:
    """One cell.

    Args:
        references: of the model.
        engine: a key of `ENGINES`.
        name: a key of `PRECISIONS`.
        quick: fewer calls.
        refused: whether a refusal is what is expected.

    Returns:
        The cell; a refusal that was not expected, an expected one that did not come, and any other error are "wrong".
    """
    precision, projection = PRECISIONS[name], PROJECTIONS.get(engine)
    calls = settings(engine, precision, whole=references.case.name in WHOLE_CASES, quick=quick)
    cell = Cell("pass", len(calls))
    reasons: list[str] = []
    for fused, chunk_size, with_inputs in calls:
        with_inputs = with_inputs and (refused or bool(references.exact(precision.dtype, projection).inputs))
        try:
            problem = references.problem(precision.dtype)
            found = _call(problem, engine, precision, (fused, chunk_size, with_inputs))
        except GradConsistError as error:
            reasons.append(_said(error))
        except RuntimeError as error:
            if precision.autocast is not None and isinstance(references.same(name, 0, projection), str):
                return Cell("refused", len(calls), reason=_said(error) + " (the model's own, without the library too)")
            return Cell("wrong", len(calls), reason="raised " + _said(error))
        else:
            if refused:
                return Cell("wrong", len(calls), reason="not refused, though the row says so")
            _keep_worst(cell.errors, _errors(found, references.exact(precision.dtype, projection)))
    if not reasons:
        return _judged(cell, references, name, projection)
    if len(reasons) < len(calls):
        return Cell("wrong", len(calls), cell.errors, reason="refused in some settings only: " + reasons[0])
    if not refused:
        return Cell("wrong", len(calls), reason="refused, which was not expected: " + reasons[0])
    return Cell("refused", len(calls), reason=reasons[0])


def _judged(cell: Cell, references: References, name: str, projection: RandomProjection | None = None) -> Cell:
    precision = PRECISIONS[name]
    inside = all(error <= precision.bound(key) for key, error in cell.errors.items())
    if inside and precision.autocast is None:
        return cell
    if not precision.factor:
        cell.verdict, cell.reason = "wrong", _beyond(cell.errors, precision.bound)
        return cell
    allowance = lambda key: precision.allowance(key, cell.own.get(key, 0.0))  # noqa: E731
    for draw in range(DRAWS):
        same = references.same(name, draw, projection)
        if isinstance(same, str):
            cell.verdict, cell.reason = "pass" if inside else "wrong", "the oracle raised " + same
            return cell
        _keep_worst(cell.own, same)
        if all(error <= allowance(key) for key, error in cell.errors.items() if key != "direction"):
            cell.verdict = "pass" if inside else "dtype"
            return cell
    cell.verdict, cell.reason = "wrong", _beyond(cell.errors, allowance)
    return cell


def _beyond(errors: dict[str, float], bound: Callable[[str], float]) -> str:
    found = (f"{key} {error:.1e} > {bound(key):.1e}" for key, error in errors.items() if not error <= bound(key))
    return ", ".join(found)


def _keep_worst(errors: dict[str, float], more: dict[str, float]) -> None:
    for key, value in more.items():
        errors[key] = math.nan if math.isnan(value) else max(errors.get(key, 0.0), value)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def rows() -> Iterator[tuple[str, Case]]:
    """Every row with the zoo that it is from."""
    zoos = {"models": CASES, "layers": LAYER_CASES, "operators": OPERATOR_CASES, "whole models": WHOLE_CASES}
    for zoo, cases in zoos.items():
        yield from ((zoo, case) for case in cases.values())
