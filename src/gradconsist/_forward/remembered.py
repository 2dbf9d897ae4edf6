"""Runs modules as if they kept nothing from one forward to the next.

Buffers are only part of what a module keeps. It may also assign to attributes, write into tensors that it never
registered, or fill lists and dictionaries. The forward for a per-sample gradient must find all of this in the state
before the call, whatever other samples, views or chunks have left there.

`per_sample` gives the model copies of its buffers. This file handles the rest, which is called memory here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from gradconsist._inputs.identity import identity

Content: TypeAlias = "dict[tuple[int, str], Any]"
"""Values by module and attribute; lists, dictionaries, sets and deques as copies."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # modes, hooks and registries, which are not memory
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_FLAGS = (bool, str, type(None))
_MOST_SWITCHES = 256  # a longer container holds data, such as a vocabulary
_DIFFERENT = "samples leave different values in attributes, and these are not tensors of one shape"


class Memory:
    """Reads and writes the attributes of a module and its submodules, except those that every module has."""

    def __init__(self, module: nn.Module) -> None:
        self._owners = list(module.modules())
        self._containers: dict[tuple[int, str], Any] = {}  # filled in place, since others may hold them too

    def read(self) -> Content:
        """Returns the present content."""
        content: Content = {}
        for number, owner in enumerate(self._owners):
            for name, value in vars(owner).items():
                if name not in _OF_EVERY_MODULE:
                    if isinstance(value, list | dict | set | deque):
                        self._containers.setdefault((number, name), value)
                        value = value.copy()
                    content[number, name] = value
        return content

    def changed(self, before: Content) -> bool:
        """Tells whether something else is there than in `before`."""
        now = self.read()
        return now.keys() != before.keys() or not all(_unchanged(now[key], old, old) for key, old in before.items())

    def restore(self, content: Content) -> None:
        """Makes the memory equal to `content`; deletes all other attributes."""
        for number, owner in enumerate(self._owners):
            own = vars(owner)
            for name in [name for name in own if name not in _OF_EVERY_MODULE and (number, name) not in content]:
                del own[name]
        self.write(content)

    def write(self, content: Content) -> None:
        """Writes `content` to its places and leaves other attributes alone."""
        for (number, name), value in content.items():
            container = self._containers.get((number, name))
            if container is not None and type(container) is type(value):
                container.clear()
                container.extend(value) if isinstance(container, list | deque) else container.update(value)
                value = container
            vars(self._owners[number])[name] = value


@contextmanager
def nothing_kept(module: nn.Module) -> Iterator[None]:
    """Restores the module's memory after the block, whatever the module writes inside it.

    Tensors among its attributes, except parameters, are replaced by copies inside the block.
    """
    memory = Memory(module)
    before = memory.read()
    registered = [(registry, list(registry)) for owner in module.modules() for registry in _registries(owner)]
    memory.write(lent({key: value for key, value in before.items() if _holds_tensors(value)}))
    try:
        yield
    finally:
        memory.restore(before)
        for registry, names in registered:
            for name in set(registry).difference(names):  # a forward that registers something
                del registry[name]


class Attributes(NamedTuple):
    """What may change the code that a model runs, without a change of its modules, as keys.

    Attributes:
        switches: the flags, strings and functions among its attributes, also in containers and in objects that hold
            options, and the number of hooks.
        everything: these, numbers, and the types of everything else. A model may count its calls.
    """

    switches: tuple[Any, ...]
    everything: tuple[Any, ...]


def attributes(model: nn.Module) -> Attributes:
    """Looks at the attributes of a model, except those that every module has."""
    switches: list[Any] = []
    everything: list[Any] = []
    known: set[int] = set()  # objects of options, which all modules may hold

    def note(value: Any, switch: bool) -> None:
        everything.append(value)
        if switch:
            switches.append(value)

    def look(value: Any, switch: bool = True, inside: bool = False) -> None:
        kind = type(value)
        if kind in _FLAGS:
            note(value, switch)
        elif kind in (int, float):
            note(value, False)
        elif isinstance(value, dict | list | tuple | set | deque):
            for each in value.items() if isinstance(value, dict) else value:
                look(each, switch and len(value) <= _MOST_SWITCHES)
        elif isinstance(value, Tensor | nn.Module):
            note(kind, False)
        elif callable(value) or isinstance(value, Enum):
            note(identity(value), switch)
        else:
            note(kind, False)
            if not inside and id(value) not in known:
                known.add(id(value))
                for each in getattr(value, "__dict__", {}).values():
                    look(each, switch, inside=True)

    for owner in model.modules():
        note(len(owner._forward_hooks) + len(owner._forward_pre_hooks), True)
        for name, value in vars(owner).items():
            if name not in _OF_EVERY_MODULE:
                look(value)
    return Attributes(tuple(switches), tuple(everything))


def _holds_tensors(value: Any) -> bool:
    """Tells whether a forward could change `value` in place, which restoring the attribute would not undo."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | deque):
        return any(isinstance(part, Tensor | list | dict | deque | tuple) for part in value)
    return isinstance(value, Tensor)


def _registries(module: nn.Module) -> list[dict[str, Any]]:
    return [vars(module)[name] for name in _REGISTRIES]


def lent(content: Any) -> Any:
    """Returns `content` with its tensors copied, except parameters; the same tensor gets the same copy."""
    copies: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
            return leaf
        return copies.setdefault(id(leaf), leaf.clone())

    return tree_map(copy, content)


class SampleStates:
    """Manages buffers and memory of a layer that runs once per sample of a batch, each time from the same state.

    Args:
        model: the whole model, which may hold buffers of the layer in other places too.
        layer: the layer.

    Attributes:
        start: the state before the first sample: buffers by name, and memory.
    """

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self._model, self._layer = model, layer
        self._memory = Memory(layer)
        self._buffers = dict(layer.named_buffers())
        self._registered = self._names()
        self.start: dict[Any, Any] = {**self._buffers, **self._memory.read()}
        self._met: dict[Any, _Met] = {}
        self._left: dict[Any, list[Any]] = {}
        self._changed: dict[Any, None] = {}  # in order, so that sums have the same order in every process
        self._plans: dict[Any, Any] = {}

    def _names(self) -> list[set[str]]:
        return [set(registry) for owner in self._layer.modules() for registry in _registries(owner)]

    def lend(self, start: dict[Any, Any]) -> dict[str, Tensor]:
        """Prepares a sample's forward from `start` with its tensors: sets the memory, returns the named buffers."""
        copies = lent(start)
        self._met = {key: _Met(copies[key], value) for key, value in start.items()}
        self._memory.restore({key: value for key, value in copies.items() if key not in self._buffers})
        return {name: copies[name] for name in self._buffers}

    def collect(self, buffers: dict[str, Tensor]) -> None:
        """Collects what a sample's forward left in buffers and memory.

        A forward that registered something or deleted an attribute raises a RuntimeError.
        """
        now: dict[Any, Any] = {name: buffers[name] for name in self._buffers}
        now.update(self._memory.read())
        if self._names() != self._registered or not self._met.keys() <= now.keys():
            raise RuntimeError(f"{type(self._layer).__name__} registers or deletes a part of itself in its forward")
        for key, value in now.items():
            self._left.setdefault(key, []).append(value)
            if key not in self._met or not self._met[key].remains(value):
                self._changed[key] = None

    def tensors(self) -> list[Tensor]:
        """Stacks what the samples left in places that changed: tensors with one row per sample.

        Different values that are not tensors of one shape raise a RuntimeError.
        """
        found: list[Tensor] = []
        for key in self._changed:
            rows, self._plans[key] = _joined(self._left[key])
            found += rows
        return found

    def put(self, tensors: Iterator[Tensor]) -> None:
        """Writes what the samples left to buffers and memory, for layers that run later in the same forward.

        `tensors` is the result of `tensors`, in the form that later layers see.
        """
        after = {key: _rebuilt(plan, tensors) for key, plan in self._plans.items()}
        memory = {key: after.get(key, value) for key, value in {**self.start, **after}.items()}
        self._memory.restore({key: value for key, value in memory.items() if key not in self._buffers})
        for name, old in self._buffers.items():
            for owner in self._model.modules() if name in after else ():
                owner._buffers.update({key: after[name] for key, own in owner._buffers.items() if own is old})


class _Met:
    """The value that one sample's forward finds in one place.

    Args:
        copy: the copy that the forward gets.
        original: the value that was copied.
    """

    def __init__(self, copy: Any, original: Any) -> None:
        self._copies, self._form = tree_flatten(copy)  # before the forward, which may change a container
        self._originals = tree_flatten(original)[0]

    def remains(self, value: Any) -> bool:
        """Tells whether `value` is unchanged: the same objects, and the same numbers in tensors."""
        flat, form = tree_flatten(value)
        return form == self._form and all(map(_unchanged, flat, self._copies, self._originals))


def _unchanged(now: Any, copy: Any, original: Any) -> bool:
    if not isinstance(now, Tensor) or not isinstance(original, Tensor):
        return _equal(now, copy)
    # Compared by value, since a write through `.data` does not change the version counter.
    alike = now.shape == original.shape and now.dtype == original.dtype and torch.equal(now, original)
    return alike and (now is copy or not now.requires_grad)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b):
        return False
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # arrays
        return False


def _joined(values: Sequence[Any]) -> tuple[list[Tensor], Any]:
    """Joins the values of all samples into one: tensors with one row per sample, and a plan of where they belong."""
    flat = [tree_flatten(value) for value in values]
    form = flat[0][1]
    tensors: list[Tensor] = []
    plan: list[tuple[bool, Any]] = []
    if any(other != form for _, other in flat):
        raise RuntimeError(_DIFFERENT)
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        stack = all(isinstance(leaf, Tensor) and leaf.shape == leaves[0].shape for leaf in leaves)
        if not (stack or all(_equal(leaf, leaves[0]) for leaf in leaves)):
            raise RuntimeError(_DIFFERENT)
        tensors += [torch.stack(leaves)] if stack else []
        plan.append((stack, None if stack else leaves[0]))
    return tensors, (plan, form)


def _rebuilt(plan: Any, tensors: Iterator[Tensor]) -> Any:
    """Rebuilds the value that `_joined` took apart, with `tensors` in place of its tensors."""
    parts, form = plan
    return tree_unflatten([next(tensors) if is_tensor else value for is_tensor, value in parts], form)
