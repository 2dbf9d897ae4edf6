"""Laws, checked by hypothesis on examples that are counted.

A law is a test over drawn examples, for each engine. It says how far its two sides were apart (`within`, `same`), so
that the same test gives a verdict in the suite, with few examples, and figures in `tests/slow/properties.py`, with
many. An example counts as effective if its body ran to the end and no equal one did before: assumed away is not tested.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

ENGINES = ("loop", "vmap", "ghost")
IN_THE_SUITE = 3  # examples a law and engine; a time limit, not a judgement


@dataclass
class Tally:
    """What became of the examples of one law with one engine."""

    asked: int = 0
    effective: int = 0
    bitwise: dict[str, list[int]] = field(default_factory=dict)  # what: [equal, compared]
    worst: dict[str, list[float]] = field(default_factory=dict)  # what: [error, its bound], the largest share of it
    _seen: set[str] = field(default_factory=set, repr=False)

    def enter(self, example: str) -> None:
        self.effective += example not in self._seen
        self._seen.add(example)


@dataclass(frozen=True)
class Law:
    """One law: `body(engine, **drawn)` passes for every example, or the law is broken."""

    number: str
    body: Callable[..., None]
    drawn: dict[str, SearchStrategy[Any]]
    engines: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.body.__name__.removeprefix("test_")

    def check(self, engine: str, examples: int, seed: int = 0) -> Tally:
        """Runs the law; the same examples for every engine and in every run with this seed."""
        tally = Tally()

        def counted(**drawn: Any) -> None:
            tally.asked += 1
            with _recording(tally):
                self.body(engine, **drawn)
            tally.enter(repr(drawn))

        # No shrinking: an example prints as the plan of a small model, and every trial costs a training step.
        profile = settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        counted.__name__ = counted.__qualname__ = self.name
        run = hypothesis.seed(zlib.crc32(self.number.encode()) + seed)(profile(given(**self.drawn)(counted)))
        run()
        return tally


LAWS: dict[str, Law] = {}
_tallies: list[Tally] = []


@contextmanager
def _recording(tally: Tally) -> Iterator[None]:
    _tallies.append(tally)
    try:
        yield
    finally:
        _tallies.pop()


def law(number: str, *, engines: tuple[str, ...] = ENGINES, share: float = 1.0, **drawn: Any) -> Callable[..., Any]:
    """Makes a test of each engine out of `body(engine, **drawn)`; `share` of the suite's usual number of examples."""

    def decorate(body: Callable[..., None]) -> Callable[[str], None]:
        assert body.__name__ not in LAWS, f"two laws are called {body.__name__}"
        entry = LAWS[body.__name__] = Law(number, body, drawn, engines)

        @pytest.mark.parametrize("engine", engines)
        def test(engine: str) -> None:
            tally = entry.check(engine, max(1, round(IN_THE_SUITE * share)))
            assert tally.effective >= tally.asked / 2, f"most examples were assumed away: {tally}"

        test.__name__ = test.__qualname__ = body.__name__
        test.__doc__, test.__module__ = body.__doc__, body.__module__
        return test

    return decorate


def within(what: str, error: float, bound: float) -> None:
    """`error` is at most `bound`; the worst is kept."""
    if _tallies:
        kept = _tallies[-1].worst.setdefault(what, [0.0, bound])
        if error * kept[1] >= kept[0] * bound:
            kept[:] = [error, bound]
    assert error <= bound, f"{what}: {error:.3g} is beyond {bound:.3g}"


def same(what: str, value: Tensor, reference: Tensor, *, required: bool = True) -> None:
    """Bit for bit; counted, and demanded where `required`. NaN equals NaN."""
    equal = value.shape == reference.shape and torch.equal(value.nan_to_num(9.0), reference.nan_to_num(9.0))
    equal = equal and torch.equal(value.isnan(), reference.isnan())
    if _tallies:
        counts = _tallies[-1].bitwise.setdefault(what, [0, 0])
        counts[0] += equal
        counts[1] += 1
    assert equal or not required, f"{what} differs: {value} and {reference}"
