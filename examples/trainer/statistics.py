"""Mean and deviation over seeds, and what two methods differ by on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
# The accuracies of a finished run.
FINAL = ("last", "median_last_20", "best")


@dataclass(frozen=True)
class Spread:
    """Some numbers in three."""

    n: int  # How many.
    mean: float  # Their mean.
    sd: float | None  # Their standard deviation, with n - 1 in the denominator; None for a single number.


@dataclass(frozen=True)
class Difference:
    """Mean of the differences by seed, with Student's interval for it."""

    n: int  # Seeds that both have.
    mean: float  # Mean difference.
    low: float | None  # Lower end of the interval at `CONFIDENCE`; None for a single seed.
    high: float | None  # Upper end.

    def contains(self, value: float) -> bool | None:
        """Whether the interval holds `value`; None where there is no interval."""
        return None if self.low is None or self.high is None else self.low <= value <= self.high


def spread(values: Sequence[float]) -> Spread:
    """Summarise numbers."""
    n = len(values)
    mean = math.fsum(values) / n
    return Spread(n, mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1)) if n > 1 else None)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """What `values` has more than `reference`, seed by seed.

    With d the n differences, the interval is mean(d) +- t(n - 1) * sd(d) / sqrt(n), t the two-sided quantile of
    Student's distribution: right for normal differences, and wide for few seeds, as it must be.
    """
    common = sorted(values.keys() & reference.keys())
    if not common:
        return None
    differences = spread([values[seed] - reference[seed] for seed in common])
    if differences.sd is None:
        return Difference(1, differences.mean, None, None)
    from scipy.special import stdtrit  # here, for it takes longer than --help may

    quantile = float(stdtrit(differences.n - 1, 0.5 + CONFIDENCE / 2))
    half = quantile * differences.sd / math.sqrt(differences.n)
    return Difference(differences.n, differences.mean, differences.mean - half, differences.mean + half)


def spread_text(numbers: dict[str, Any] | None, *, digits: int = 1) -> str:
    """Mean, deviation and number: `57.1 ± 1.2 (5)`; a dash for None."""
    if numbers is None:
        return "-"
    deviation = "" if numbers["sd"] is None else f" ± {numbers['sd']:.{digits}f}"
    return f"{numbers['mean']:.{digits}f}{deviation} ({numbers['n']})"


def difference_text(numbers: dict[str, Any] | None, *, digits: int = 1) -> str:
    """Mean difference, interval and number: `+0.3 [-1.2, +1.8] (5)`; a dash for None."""
    if numbers is None:
        return "-"
    interval = ""
    if numbers["low"] is not None:
        interval = f" [{signed(numbers['low'], digits=digits)}, {signed(numbers['high'], digits=digits)}]"
    return f"{signed(numbers['mean'], digits=digits)}{interval} ({numbers['n']})"


def signed(value: float | None, *, digits: int = 1) -> str:
    """A difference with its sign; a dash for None."""
    return "-" if value is None else f"{round(value, digits) + 0.0:+.{digits}f}"  # 0.0 instead of -0.0
