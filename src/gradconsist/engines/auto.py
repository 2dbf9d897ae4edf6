"""The default engine: the fastest one that can run the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from gradconsist.engines.base import Engine, Problem
from gradconsist.engines.ghost import GhostEngine
from gradconsist.engines.loop import LoopEngine
from gradconsist.types import GradProducts

logger = logging.getLogger("gradconsist")


class AutoEngine:
    """Uses `GhostEngine` until torch refuses the model under vmap, then `LoopEngine`. Both are exact.

    The logger "gradconsist" warns once of the change, because it costs time.

    Attributes:
        engine: the engine in use.
        reason: why it is the loop, or None.
    """

    projects: ClassVar[bool] = True
    gives_losses: ClassVar[bool] = True

    def __init__(self) -> None:
        self.engine: Engine = GhostEngine()
        self.reason: str | None = None

    @property
    def most_pairs(self) -> int | None:
        """What the engine in use has."""
        return getattr(self.engine, "most_pairs", None)

    def products(self, problem: Problem) -> GradProducts:
        """See `Engine.products`."""
        return self.engine.products(problem)

    @contextmanager
    def loop_after(self, error: RuntimeError) -> Iterator[None]:
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
        self.reason = str(error)
        logger.warning("engine='auto' uses the per-sample loop from now on, since vmap refused the model: %s", error)

    def __repr__(self) -> str:
        return f"AutoEngine({self.engine!r})"
