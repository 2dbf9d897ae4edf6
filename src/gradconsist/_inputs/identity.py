"""Numbers for objects by which a remembered check knows them again."""

from __future__ import annotations

import itertools
import os
import weakref
from typing import Any

_KNOWN: dict[int, tuple[weakref.ref[Any], int]] = {}
_NUMBERS = itertools.count(int.from_bytes(os.urandom(8), "big"))  # others in each process: results may be pickled


def identity(thing: Any) -> int:
    """Returns a number that no other object gets, not even one that lies at the same address later, unlike ``id``."""
    known = _KNOWN.get(id(thing))
    if known is not None and known[0]() is thing:
        return known[1]
    try:
        reference = weakref.ref(thing)
    except TypeError:  # what C code made, and lives on
        return id(thing)
    number = next(_NUMBERS)
    _KNOWN[id(thing)] = (reference, number)
    return number
