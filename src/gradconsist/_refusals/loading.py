"""Checks by its keys, before loading, that a `state_dict` belongs to the module it is loaded into."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from gradconsist.errors import StateError

_WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}


def check_keys(owner: nn.Module, state: Any, name: str) -> None:
    """Refuses the state of another object: a module inside `owner`, a module around it, or a wrapped one.

    Torch reports all other differences, with the keys. `name` is what messages call the owner.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"`state_dict` is of type {type(state).__name__}: pass what `{name}.state_dict()` returned.")
    own, given = set(owner.state_dict()), {str(key) for key in state}
    if not given or given <= own:
        return
    kind = type(owner).__name__
    for prefix, wrapper in _WRAPPERS.items():
        if all(key.startswith(prefix) for key in given):
            found = _owner_of(owner, own, {key.removeprefix(prefix) for key in given})
            if found is not None:
                place = f"{name}.{found}" if found else name
                raise StateError(
                    f"the keys of `state_dict` start with {prefix!r}, as {wrapper} saves them: load"
                    f" `{{key.removeprefix({prefix!r}): value for key, value in state_dict.items()}}` with"
                    f" `{place}.load_state_dict(...)`."
                )
    found = _owner_of(owner, own, given)
    if found:
        what = "the bare model" if found.rsplit(".", 1)[-1] == "model" else f"the {kind}'s `{found}` alone"
        raise StateError(
            f"`state_dict` has the keys of {what}, not those of a {kind}: load it with"
            f" `{name}.{found}.load_state_dict(...)`."
        )
    inside = {key.removeprefix("method.") for key in given if key.startswith("method.")}
    if inside and inside <= own and given - {f"method.{key}" for key in inside} <= {"_extra_state"}:
        raise StateError(
            f"`state_dict` has the keys of a GGCRWrapper around a {kind}: load it into the wrapper, or load"
            " `{key.removeprefix('method.'): value for key, value in state_dict.items() if key.startswith('method.')}`"
            f" with `{name}.load_state_dict(...)`."
        )


def _owner_of(owner: nn.Module, own: Collection[str], given: Collection[str]) -> str | None:
    """Returns the path of the first module of `owner`, itself included, that has all the keys `given`."""
    for path, _ in owner.named_modules():
        if all((f"{path}.{key}" if path else key) in own for key in given):
            return path
    return None
