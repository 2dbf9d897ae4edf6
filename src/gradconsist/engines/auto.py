"""The default: the fastest engine that takes the model."""

from __future__ import annotations

import logging

import torch

from gradconsist.engines.base import Problem
from gradconsist.engines.loop import LoopEngine
from gradconsist.engines.vmap import VmapEngine
from gradconsist.errors import UnsupportedModuleError
from gradconsist.similarity import GradProducts

logger = logging.getLogger("gradconsist")


class AutoEngine:
    """`VmapEngine` until torch refuses the model under vmap, from then on `LoopEngine`. Both are exact.

    The change is told once, as a warning of the logger "gradconsist", because it costs time.
    """

    def __init__(self) -> None:
        self.engine: LoopEngine | VmapEngine = VmapEngine()

    def products(self, problem: Problem) -> GradProducts:
        """See `Engine.products`."""
        if isinstance(self.engine, LoopEngine):
            return self.engine.products(problem)
        try:
            return self.engine.products(problem)
        except torch.OutOfMemoryError:
            raise  # a smaller chunk may fit
        except (RuntimeError, UnsupportedModuleError) as error:
            # The loop is the judge of what cannot be done at all: if it fails too, its error is the one to see.
            result = LoopEngine().products(problem)
            logger.warning("engine='auto' uses the per-sample loop, since vmap refused the model: %s", error)
            self.engine = LoopEngine()
            return result

    def preferred_chunk(self, problem: Problem) -> int:
        """What the engine in use prefers."""
        return self.engine.preferred_chunk(problem)
