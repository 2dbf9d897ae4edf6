"""Seeded bugs: mistakes that raise no error, each of which the tests must see.

    python tests/slow/seeded_bugs.py                # applies one at a time to a copy, and runs the tests on it

Each is a replacement of text in the source, with the law that it breaks and the tests that should notice. A bug that
survives is a hole in the suite; one that no longer applies is mended here together with the source
(tests/core/test_seeded_bugs.py says which).
"""

from mutants import (
    adapters,
    batchnorm,
    devices,
    ghost,
    layers,
    methods,
    projection,
    quantity,
    regular,
    reports,
    sharing,
    state,
    training,
)
from mutants.bug import Bug, StaleError

BUGS: list[Bug] = [
    *quantity.BUGS,
    *batchnorm.BUGS,
    *ghost.BUGS,
    *layers.BUGS,
    *projection.BUGS,
    *state.BUGS,
    *training.BUGS,
    *sharing.BUGS,
    *methods.BUGS,
    *reports.BUGS,
    *adapters.BUGS,
    *regular.BUGS,
    *devices.BUGS,
]

__all__ = ["BUGS", "Bug", "StaleError"]
