"""What the checks of a model have found, kept by its loss between calls."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from gradconsist._forward.remembered import attributes
from gradconsist._inputs.batch import constants, shapes
from gradconsist._inputs.identity import identity
from gradconsist.types import Inputs


class State(NamedTuple):
    """The state of a model at one call.

    Attributes:
        key: what may change its code, other than numbers, with the shapes and constants of its inputs.
        attributes: all of its attributes that may matter, numbers too.
    """

    key: tuple[Hashable, ...]
    attributes: Hashable


@dataclass
class Probed:
    """Results of the checks of one model, kept by its loss between calls.

    Attributes:
        passed: checks that passed, each with the state of the model at that time.
        classes: number of columns of the logits; None if there are no logits, or before the first call.
        functions: custom autograd Functions that the model runs, and whether their second derivative was tested.
        met: keys of the custom Functions that were met so far, see `keys_of`.
        states: states of the model that were met, each for itself.
        told: warnings that were given.
        report_only: whether a Function with a wrong second derivative goes into a report instead of raising an error.
        dense: weights of sparse embeddings that have another use in the forward, so their gradient is dense.
        kept: bytes that the graph of one pair keeps, by engine, shapes and constants.
        samples: the most samples that ran together in a check of their independence.
        attributes: all attributes of the model that may matter, at the last call.
        changes: how often these have changed.
        calls: number of calls that were checked.
        due: whether many samples must show that they are independent, as none did since `outgrown` asked for it.
        differences: what the model computes otherwise in the method than in the comparison, or None, by its state.
        fitted: pairs of the chunk that fitted after the device ran out of memory; None if it never did.
    """

    passed: set[Hashable] = field(default_factory=set)
    classes: int | None = None
    functions: dict[str, bool] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)
    states: dict[Hashable, Any] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    report_only: bool = False
    dense: set[str] = field(default_factory=set)
    kept: dict[Hashable, int] = field(default_factory=dict)
    samples: int = 0
    attributes: Hashable = None
    changes: int = 0
    calls: int = 0
    due: bool = False
    differences: dict[tuple[Hashable, ...], str | None] = field(default_factory=dict)
    fitted: int | None = None

    def once(self, warning: str) -> bool:
        """Tells whether `warning` is given for the first time, and marks it as given."""
        first = warning not in self.told
        self.told.add(warning)
        return first

    def outgrown(self, attributes: Hashable, samples: int) -> bool:
        """Tells whether samples must show again that they are independent, although they did before.

        That is so for more samples together than ever, since some models mix three or more only, and for other numbers
        among the model's attributes. A model may count its calls, so of many changes ever fewer lead to a check: the
        first eight, then the 16th, the 32nd, and so on. So do the calls from the 16th on, whose data may be of another
        kind.
        """
        more, changed = samples > self.samples, attributes != self.attributes
        self.samples, self.attributes = max(samples, self.samples), attributes
        self.changes += changed
        self.calls += 1
        return more or (changed and self.changes <= 8) or (changed and _is_power(self.changes)) or _is_power(self.calls)

    def state(self, model: nn.Module, *views: Inputs) -> State:
        """Looks at what may change the code that a model runs: its modules, modes and attributes, and its inputs.

        Of `views`, which have the same constants, these and the shapes count, since a model may take another way for
        long sequences or large images.
        """
        modules = tuple((identity(module), module.training) for module in model.modules())
        trained = tuple(parameter.requires_grad for parameter in model.parameters())
        found = attributes(model)
        state = modules, trained, constants(views[0]), found.switches
        # One object for equal ones: a state is large, and texts come in hundreds of lengths.
        key = self.states.setdefault(state, state), tuple(map(shapes, views))
        return State(self.states.setdefault(key, key), found.everything)


def _is_power(count: int) -> bool:
    """Tells whether a count is a power of two from 16 on."""
    return count >= 16 and count & (count - 1) == 0
