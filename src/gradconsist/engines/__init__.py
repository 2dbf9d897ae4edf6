"""Computes the inner products of per-sample gradients.

An engine turns pairs of views into three numbers per pair, ||g_w||^2, ||g_s||^2 and ⟨g_w, g_s⟩, each differentiable in
the model's parameters. All engines are exact and interchangeable. They differ in time, in memory, and in the models
that torch lets them run. To write an engine, give any object a method `products(problem) -> GradProducts`.

    >>> from gradconsist.engines import ENGINES
    >>> sorted(ENGINES)
    ['auto', 'ghost', 'loop', 'vmap']
"""

from collections.abc import Callable

from gradconsist._inputs.options import check_choice
from gradconsist.engines.auto import AutoEngine
from gradconsist.engines.base import Engine, Problem
from gradconsist.engines.ghost import GhostEngine, register_rule, unregister_rule
from gradconsist.engines.loop import LoopEngine
from gradconsist.engines.projection import RandomProjection
from gradconsist.engines.vmap import VmapEngine
from gradconsist.errors import ConfigError
from gradconsist.types import GradProducts

ENGINES: dict[str, Callable[[], Engine]] = {
    "auto": AutoEngine,
    "ghost": GhostEngine,
    "loop": LoopEngine,
    "vmap": VmapEngine,
}
"""Engines by the name that the argument `engine` takes."""


def make_engine(engine: str | Engine, projection: RandomProjection | None = None) -> Engine:
    """Returns the engine of a name, or `engine` itself if it is an object; it must support the projection."""
    if isinstance(engine, str):
        check_choice("engine", engine, ENGINES)
        return ENGINES[engine]()
    if isinstance(engine, type) or not callable(getattr(engine, "products", None)):
        raise ConfigError(
            f"`engine` is {engine!r}: pass one of {sorted(ENGINES)}, or an engine object such as VmapEngine()."
        )
    if projection is not None and not getattr(engine, "projects", False):
        raise ConfigError(
            f"`projection` needs an engine that supports it, and {engine!r} does not: pass `engine='auto'`, or compare"
            " `problem.projection.sketches(gradients)` in its `products` and set its attribute `projects` to True."
        )
    return engine


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
