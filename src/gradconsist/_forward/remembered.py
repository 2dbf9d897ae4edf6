"""What modules keep from one forward to the next, and how to run them as if they kept nothing.

Buffers are only a part of it: a module may also assign to attributes, write into tensors that it never registered, or
fill lists and dictionaries. A per-sample gradient is that of a forward that meets all of this as it was before the
call, whatever other samples, views or chunks have left there.

Buffers are handed to a model as copies (`forward`). This file takes care of the rest, which is called memory here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Content: TypeAlias = "dict[tuple[int, str], Any]"
"""Values by module and attribute; lists, dictionaries, sets and deques as copies."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # modes, hooks and registries: no memory of a module's own
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_DIFFERENT = "samples leave different things in attributes, which are no tensors of one shape"


class Memory:
    """The attributes of a module and its submodules, beside those that every module has.

    Args:
        module: whose attributes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = list(module.modules())
        self._containers: dict[tuple[int, str], Any] = {}  # filled in place: others may hold them, too

    def read(self) -> Content:
        """What is there now."""
        content: Content = {}
        for number, owner in enumerate(self._owners):
            for name, value in vars(owner).items():
                if name not in _OF_EVERY_MODULE:
                    if isinstance(value, list | dict | set | deque):
                        self._containers.setdefault((number, name), value)
                        value = value.copy()
                    content[number, name] = value
        return content

    def restore(self, content: Content) -> None:
        """Makes it what `content` says, and nothing else."""
        for number, owner in enumerate(self._owners):
            own = vars(owner)
            for name in [name for name in own if name not in _OF_EVERY_MODULE and (number, name) not in content]:
                del own[name]
        self.write(content)

    def write(self, content: Content) -> None:
        """Puts `content` in its places."""
        for (number, name), value in content.items():
            container = self._containers.get((number, name))
            if container is not None and type(container) is type(value):
                container.clear()
                container.extend(value) if isinstance(container, list | deque) else container.update(value)
                value = container
            vars(self._owners[number])[name] = value


@contextmanager
def nothing_kept(module: nn.Module) -> Iterator[None]:
    """Within the block the module may write where it likes; afterwards its memory is as it was.

    Args:
        module: the module. Tensors among its attributes, if they are no parameters, are lent as copies.

    Yields:
        None.
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


def _holds_tensors(value: Any) -> bool:
    """Whether a forward could write into it in a way that putting it back does not undo."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | deque):
        return any(isinstance(part, Tensor | list | dict | deque | tuple) for part in value)
    return isinstance(value, Tensor)


def _registries(module: nn.Module) -> list[dict[str, Any]]:
    return [vars(module)[name] for name in _REGISTRIES]


def lent(content: Any) -> Any:
    """`content` with copies in place of its tensors, the same copy for the same tensor."""
    copies: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
            return leaf
        return copies.setdefault(id(leaf), leaf.clone())

    return tree_map(copy, content)


class SampleStates:
    """The buffers and the memory of a layer that runs once for each sample of a batch, every time from the same start.

    Args:
        model: the whole model, which may hold buffers of the layer in other places, too.
        layer: the layer.

    Attributes:
        start: what is there before: buffers by name, and memory.
    """

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self._model, self._layer = model, layer
        self._memory = Memory(layer)
        self._buffers = dict(layer.named_buffers())
        self._registered = self._names()
        self.start: dict[Any, Any] = {**self._buffers, **self._memory.read()}
        self._met: dict[Any, _Met] = {}
        self._left: dict[Any, list[Any]] = {}
        self._changed: set[Any] = set()
        self._plans: dict[Any, Any] = {}

    def _names(self) -> list[set[str]]:
        return [set(registry) for owner in self._layer.modules() for registry in _registries(owner)]

    def lend(self, start: dict[Any, Any]) -> dict[str, Tensor]:
        """Before a sample's forward.

        Args:
            start: `self.start` with the sample's own tensors.

        Returns:
            Buffers for this forward, by name.
        """
        copies = lent(start)
        self._met = {key: _Met(copies[key], value) for key, value in start.items()}
        self._memory.restore({key: value for key, value in copies.items() if key not in self._buffers})
        return {name: copies[name] for name in self._buffers}

    def collect(self, buffers: dict[str, Tensor]) -> None:
        """After a sample's forward.

        Args:
            buffers: what the forward has left in their places.

        Raises:
            RuntimeError: it registered something, or deleted an attribute.
        """
        now: dict[Any, Any] = {name: buffers[name] for name in self._buffers}
        now.update(self._memory.read())
        if self._names() != self._registered or not self._met.keys() <= now.keys():
            raise RuntimeError(f"{type(self._layer).__name__} registers or deletes a part of itself in its forward")
        for key, value in now.items():
            self._left.setdefault(key, []).append(value)
            if key not in self._met or not self._met[key].remains(value):
                self._changed.add(key)

    def tensors(self) -> list[Tensor]:
        """What the samples have left in places that changed, with a row for each sample.

        Raises:
            RuntimeError: they left different things that are no tensors of one shape.
        """
        found: list[Tensor] = []
        for key in self._changed:
            rows, self._plans[key] = _joined(self._left[key])
            found += rows
        return found

    def put(self, tensors: Iterator[Tensor]) -> None:
        """Hands what they have left to whatever follows in the same forward.

        Args:
            tensors: of `tensors`, as those see them who follow.
        """
        after = {key: _rebuilt(plan, tensors) for key, plan in self._plans.items()}
        memory = {key: after.get(key, value) for key, value in {**self.start, **after}.items()}
        self._memory.restore({key: value for key, value in memory.items() if key not in self._buffers})
        for name, old in self._buffers.items():
            for owner in self._model.modules() if name in after else ():
                owner._buffers.update({key: after[name] for key, own in owner._buffers.items() if own is old})


class _Met:
    """What one sample meets in one place.

    Args:
        copy: what it is lent.
        original: what that was copied from.
    """

    def __init__(self, copy: Any, original: Any) -> None:
        self._copies, self._form = tree_flatten(copy)  # now: the forward may change what a container holds
        self._originals = tree_flatten(original)[0]

    def remains(self, value: Any) -> bool:
        """Whether that is what `value` still is: the same objects, and in tensors the same numbers."""
        flat, form = tree_flatten(value)
        return form == self._form and all(map(_unchanged, flat, self._copies, self._originals))


def _unchanged(now: Any, copy: Any, original: Any) -> bool:
    if not isinstance(now, Tensor) or not isinstance(original, Tensor):
        return _equal(now, copy)
    # By value, since a write through `.data` leaves no version.
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
    """One value for a whole batch from one for each sample: tensors with a row for each, and where they belong."""
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
    """The value that `_joined` took apart, with `tensors` in the place of its tensors."""
    parts, form = plan
    return tree_unflatten([next(tensors) if is_tensor else value for is_tensor, value in parts], form)
