"""How the inner products of per-sample gradients are computed.

An engine turns pairs of views into three numbers a pair, ||g_w||^2, ||g_s||^2 and ⟨g_w, g_s⟩, each differentiable in
the model's parameters. All engines are exact and interchangeable; they differ in time, memory and in what torch lets
them run. An engine of your own is any object with a method `products(problem) -> GradProducts`.

    >>> from gradconsist.engines import ENGINES
    >>> sorted(ENGINES)
    ['auto', 'ghost', 'loop', 'vmap']
"""

from collections.abc import Callable

from gradconsist.engines.auto import AutoEngine
from gradconsist.engines.base import Engine, Problem
from gradconsist.engines.ghost import GhostEngine, register_rule, unregister_rule
from gradconsist.engines.loop import LoopEngine
from gradconsist.engines.vmap import VmapEngine
from gradconsist.similarity import GradProducts

ENGINES: dict[str, Callable[[], Engine]] = {
    "auto": AutoEngine,
    "ghost": GhostEngine,
    "loop": LoopEngine,
    "vmap": VmapEngine,
}
"""Engines by the name that the argument `engine` takes."""

__all__ = [
    "ENGINES",
    "AutoEngine",
    "Engine",
    "GhostEngine",
    "GradProducts",
    "LoopEngine",
    "Problem",
    "VmapEngine",
    "register_rule",
    "unregister_rule",
]
