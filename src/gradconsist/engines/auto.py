"""The default engine: the fastest one that can run the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from gradconsist.engines.base import Problem
from gradconsist.engines.ghost import GhostEngine
from gradconsist.engines.loop import LoopEngine
from gradconsist.types import GradProducts

logger = logging.getLogger("gradconsist")


class AutoEngine:
    """Uses `GhostEngine` until torch refuses the model under vmap, then `LoopEngine`. Both are exact.

    The logger "gradconsist" warns once of the change, because it costs time.
    """

    projects: ClassVar[bool] = True

    def __init__(self) -> None:
        self.engine: GhostEngine | LoopEngine = GhostEngine()

    def products(self, problem: Problem) -> GradProducts:
        """See `Engine.products`."""
        return self.engine.products(problem)

    def preferred_chunk(self, problem: Problem) -> int:
        """Returns what the engine in use prefers."""
        return self.engine.preferred_chunk(problem)

    @contextmanager
    def fall_back(self, error: RuntimeError) -> Iterator[None]:
        """Runs the block with the loop engine after `error`, and keeps that engine if the block succeeds.

        Args:
            error: what the ghost engine, or the derivative of its result, raised.

        Yields:
            None.

        Raises:
            RuntimeError: `error` itself, if the loop is in use already.
        """
        if isinstance(self.engine, LoopEngine):
            raise error
        before, self.engine = self.engine, LoopEngine()
        try:
            yield
        except BaseException:
            self.engine = before
            raise
        logger.warning("engine='auto' uses the per-sample loop from now on, since vmap refused the model: %s", error)

    def __repr__(self) -> str:
        return f"AutoEngine({self.engine!r})"
