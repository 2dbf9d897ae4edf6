"""Weights as pure functions of the step, so that a resumed run has only the step to restore."""

from __future__ import annotations

import math


def linear_ramp(step: int, steps: int) -> float:
    """Ramps as min(1, step / steps): 0 at step 0, 1 from `steps` on; always 1 for ``steps=0``.

    >>> [linear_ramp(step, 4) for step in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """
    return min(1.0, step / steps) if steps > 0 else 1.0


def warmup_then_ramp(step: int, weight: float, warmup_steps: int, ramp_steps: int = 0) -> float:
    """Returns lambda(t): 0 while step < warmup_steps, then `weight`, reached linearly over `ramp_steps`.

    The ramp's first step has weight / ramp_steps rather than 0, so the term is active as soon as the warm-up ends.

    >>> [warmup_then_ramp(step, 0.1, 1000) for step in (0, 999, 1000)]
    [0.0, 0.0, 0.1]
    >>> [warmup_then_ramp(step, 1.0, 10, 4) for step in (9, 10, 13, 20)]
    [0.0, 0.25, 1.0, 1.0]
    """
    if step < warmup_steps:
        return 0.0
    return weight * linear_ramp(step - warmup_steps + 1, ramp_steps)


def sigmoid_ramp(step: int, steps: int) -> float:
    """Ramps as exp(-5 (1 - t)^2) with t = min(1, step / steps): slow at first, 1 from `steps`; 1 for ``steps=0``.

    >>> [round(sigmoid_ramp(step, 4), 4) for step in (0, 2, 4, 9)]
    [0.0067, 0.2865, 1.0, 1.0]
    """
    return math.exp(-5 * (1 - linear_ramp(step, steps)) ** 2)
