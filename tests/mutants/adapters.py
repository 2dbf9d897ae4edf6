"""Bugs in what is attached to other frameworks' objects."""

from __future__ import annotations

from mutants.bug import Bug

USB, PAIRS = "adapters/usb.py", "adapters/usb_pairs.py"
TESTS = "adapters/test_usb.py"

BUGS = [
    Bug(
        "usb: every pair counts, whatever the algorithm's mask says",
        "the weight of a pair is the algorithm's own mask",
        f"{TESTS}::test_the_loss_gains_the_weighted_term",
        PAIRS, "    return call.targets, call.mask\n", "    return call.targets, None\n",
    ),
    Bug(
        "usb: the listener stays in place",
        "what a step replaces is back after it",
        f"{TESTS}::test_an_error_inside_leaves_no_trace",
        PAIRS, 'del own["consistency_loss"], own["compute_prob"]\n            own.update(kept)\n', "pass\n",
    ),
    Bug(
        "usb: the schedule starts anew when a term is attached to a run",
        "the schedule goes on where the algorithm does",
        f"{TESTS}::test_the_schedule_is_in_the_checkpoint",
        USB, "        self.wrapper.step = int(algorithm.it)\n        check", "        check",
    ),
    Bug(
        "usb: detach forgets methods that the user had put on the object",
        "detach leaves the object exactly as it was",
        f"{TESTS}::test_detach_leaves_the_object_as_it_was",
        USB, "        own.update(self._kept)\n        self._installed = {}\n", "        self._installed = {}\n",
    ),
]  # fmt: skip
