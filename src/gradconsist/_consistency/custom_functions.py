"""Tests the second derivative of custom `torch.autograd.Function`s inside a model.

L_g is differentiated through the backward of every operation. The author of a Function wrote that backward, perhaps
for the first derivative only. If it uses a detached tensor, torch differentiates what is left, and part of the gradient
is silently missing. So each Function that a model runs is tested by itself, once:

    s(x, c) = ⟨backward of c at x, v⟩        ⟨ds/d(x, c), u⟩ = (s((x, c) + h u) - s((x, c) - h u)) / 2 h

with the inputs x of a call that the model has made, a random cotangent c and random directions v and u, in float64 (on
the CPU, if the device has none). The backward need not be the derivative of the forward: a straight-through estimator
passes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from gradconsist._forward.randomness import preserved_randomness
from gradconsist._inputs.precision import in_float64
from gradconsist._refusals.graphs import cut_node, name_of, nodes
from gradconsist.errors import UnsupportedModuleError

_STEPS = (1e-5, 1e-6, 1e-7)  # relative to the inputs; the smallest error counts, since a step may cross a kink
_TOLERANCE = 1e-4
_MOST_CALLS = 4  # calls of one Function that differ in their non-tensor arguments or shapes


@dataclass(frozen=True)
class Call:
    """One call of a Function.

    Attributes:
        function: the Function's class.
        args: arguments of `apply`, with tensors detached.
        trained: whether each argument required grad.
        path: path of the module that made the call; empty for the model itself, None if no module did.
    """

    function: type[Function]
    args: tuple[Any, ...]
    trained: tuple[bool, ...]
    path: str | None

    @property
    def where(self) -> str:
        """Name and place, for a message."""
        place = "outside its modules" if self.path is None else f"in {self.path!r}" if self.path else "in its forward"
        return f"{self.function.__name__} ({place})"


def custom_functions(loss: Tensor) -> tuple[list[type[Function]], list[str]]:
    """Finds custom Functions in a graph, each once: the classes of those in Python, the names of those in C++."""
    found: dict[type[Function], None] = {}
    foreign: dict[str, None] = {}
    for node in nodes(loss):
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and not function.__module__.startswith("gradconsist."):
            found[function] = None
        elif "CppNode<" in name_of(node):
            foreign[name_of(node).partition("CppNode<")[2].rstrip(">").rpartition("::")[2]] = None
    return list(found), list(foreign)


def check_custom_functions(loss: Tensor, model: nn.Module, again: Callable[[], object]) -> dict[str, bool]:
    """Tests the second derivative of every custom Function in the graph of the loss of one sample; refuses wrong ones.

    `again` computes the loss once more. The result maps each Function, with its place, to whether it could be tested.
    """
    classes, foreign = custom_functions(loss)
    verdicts = dict.fromkeys((f"{name} (in C++)" for name in foreign), False)
    if not classes:
        return verdicts
    with _recorded(classes, model) as calls:
        again()
    for call in calls:
        try:
            error = _error(call)
        except Exception:  # the Function is the user's, and may raise anything in float64
            error = None
        if error == math.inf:
            raise UnsupportedModuleError(
                f"the custom autograd.Function {call.where} is without a second derivative: its backward is marked"
                " once_differentiable. Write the backward with differentiable operations, or replace the Function."
            )
        if error is not None and error > _TOLERANCE:
            raise UnsupportedModuleError(
                f"the custom autograd.Function {call.where} has a wrong second derivative, off by"
                f" {min(error, 1.0):.0%} from finite differences of its backward: the backward probably uses a detached"
                " tensor. Keep tensors with `ctx.save_for_backward` and compute the backward from them with"
                " differentiable operations, or replace the Function; `diagnostics.verify` tests the whole model."
            )
        verdicts[call.where] = verdicts.get(call.where, True) and error is not None
    return verdicts


@contextmanager
def _recorded(functions: Iterable[type[Function]], model: nn.Module) -> Iterator[list[Call]]:
    """Records calls of these Functions inside the block: the first few of each that differ in more than numbers."""
    paths = {id(module): path for path, module in model.named_modules()}
    calls: list[Call] = []
    own = [(function, vars(function).get("forward")) for function in functions]
    try:
        for function, _ in own:
            setattr(function, "forward", staticmethod(_recorder(function, paths, calls)))  # noqa: B010
        yield calls
    finally:
        for function, forward in own:
            if forward is None:
                del function.forward
            else:
                setattr(function, "forward", forward)  # noqa: B010


def _recorder(function: type[Function], paths: dict[int, str], calls: list[Call]) -> Callable[..., Any]:
    forward = function.forward
    with_context = function.setup_context is Function.setup_context
    seen: set[str] = set()

    def record(*args: Any) -> Any:
        own = args[1:] if with_context else args
        trained = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in own)
        kind = str([(type(arg), arg.shape) if isinstance(arg, Tensor) else arg for arg in own])
        # A call on inputs alone has no derivative to test.
        if any(trained) and kind not in seen and len(seen) < _MOST_CALLS:
            seen.add(kind)
            plain = tuple(arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in own)
            calls.append(Call(function, plain, trained, _caller(paths)))
        return forward(*args)

    return record


def _caller(paths: dict[int, str]) -> str | None:
    """Returns the path of the innermost module whose forward is running."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in paths:
            return paths[id(module)]
        frame = frame.f_back
    return None


def _error(call: Call) -> float | None:
    """Measures how far a Function's second derivative is from finite differences of its backward, relatively.

    The error is infinite if the backward cannot be differentiated, and None if that of the Function itself hides it.
    """
    generator = torch.Generator().manual_seed(0)
    x = [in_float64(arg) for arg, trained in zip(call.args, call.trained, strict=True) if trained]
    with torch.enable_grad():
        outputs = _outputs(call, [part.clone().requires_grad_() for part in x])
    point = [*x, *(_random(y, generator) for y in outputs)]
    v = [_random(part, generator) for part in x]

    def s_at(h: float, u: Sequence[Tensor]) -> float:
        return float(_s(call, [part + h * w for part, w in zip(point, u, strict=True)], v, graph=False))

    found = []
    for _ in range(2):
        u = [_random(part, generator) * _size(part) for part in point]
        numeric = [(s_at(h, u) - s_at(-h, u)) / (2 * h) for h in _STEPS]
        leaves = [part.clone().requires_grad_() for part in point]
        s = _s(call, leaves, v, graph=True)
        if cut_node(s):
            return math.inf
        parts: Sequence[Tensor | None] = [None] * len(leaves)
        if s.requires_grad:
            parts = torch.autograd.grad(s, leaves, allow_unused=True)
        analytic = sum(float((part * w).sum()) for part, w in zip(parts, u, strict=True) if part is not None)
        # Relative to the derivative, or to s if both derivatives are only rounding error.
        scale = max(abs(analytic), *map(abs, numeric), 1e-9 * float(s.detach().abs()), 1e-30)
        error = min(abs(analytic - each) for each in numeric) / scale
        noise = min(abs(a - b) for a, b in pairwise(numeric)) / scale
        if not math.isfinite(scale) or (error > _TOLERANCE and noise > 0.1 * error):
            return None  # not float64 throughout, or random, or at a kink
        found.append(error)
    return min(found)


def _s(call: Call, point: Sequence[Tensor], v: Sequence[Tensor], *, graph: bool) -> Tensor:
    """Computes s = ⟨backward of c at x, v⟩ at the point (x, c)."""
    x = [part if part.requires_grad else part.detach().requires_grad_() for part in point[: len(v)]]
    with torch.enable_grad():
        outputs = _outputs(call, x)
        found = torch.autograd.grad(outputs, x, list(point[len(v) :]), create_graph=graph, allow_unused=True)
        parts = [(part * w).sum() for part, w in zip(found, v, strict=True) if part is not None]
        return torch.stack(parts).sum() if parts else v[0].new_zeros([])


def _outputs(call: Call, x: Sequence[Tensor]) -> list[Tensor]:
    """Runs the Function and returns its differentiable outputs; random numbers are the same in every run."""
    supply = iter(x)
    args = []
    for arg, trained in zip(call.args, call.trained, strict=True):
        if trained:
            args.append(next(supply).clone())  # a copy: a Function may write into its input
        else:
            args.append(in_float64(arg) if isinstance(arg, Tensor) else arg)
    with preserved_randomness(x[0].device, seed=0):
        result = call.function.apply(*args)
    flat = result if isinstance(result, tuple) else (result,)
    return [y for y in flat if isinstance(y, Tensor) and y.requires_grad and y.is_floating_point()]


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def _size(part: Tensor) -> float:
    """Returns the root mean square of the entries, or 1 if all are 0."""
    return float(part.detach().square().mean().sqrt()) or 1.0
