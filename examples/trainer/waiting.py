"""Whether a run waits for its images: measured in every step, and said early, once, with a remedy."""

from __future__ import annotations

# Steps that are left out (workers start, kernels are chosen), and steps that are judged.
WARMUP_STEPS = 10
JUDGED_STEPS = 40
# Of the time of a step. Below it, faster loading would gain less than a quarter.
LIMIT = 0.2


class LoaderWatch:
    """Counts the seconds of waiting for the loader, and those of the steps themselves."""

    def __init__(self, workers: int, spare: int, *, term_later: bool = False) -> None:
        self.workers, self.spare, self.term_later = workers, spare, term_later
        self.steps, self.waited, self.total = 0, 0.0, 0.0
        self._start = 0.0, 0.0

    def add(self, waited: float, stepped: float) -> str | None:
        """Take the seconds of one step."""
        self.steps += 1
        self.waited += waited
        self.total += waited + stepped
        if self.steps == WARMUP_STEPS:
            self._start = self.waited, self.total
        if self.steps != WARMUP_STEPS + JUDGED_STEPS:
            return None
        waited, total = self.waited - self._start[0], self.total - self._start[1]
        return self._advice(waited, total) if waited > LIMIT * total else None

    @property
    def share(self) -> float:
        """Share of the time so far that was spent on waiting."""
        return self.waited / max(self.total, 1e-9)

    def _advice(self, waited: float, total: float) -> str:
        if self.workers < self.spare:
            remedy = f"give --workers {min(self.spare, 2 * max(1, self.workers))} (now {self.workers})"
        else:
            remedy = "all cores are busy, so only more of them or a cheaper --strong help"
        later = " The gradient consistency, which joins later, makes this share smaller." if self.term_later else ""
        steps = f"steps {WARMUP_STEPS + 1} to {WARMUP_STEPS + JUDGED_STEPS}"
        return (
            f"note: the data loader is the bottleneck: {steps} waited "
            f"{1000 * waited / JUDGED_STEPS:.1f} ms of {1000 * total / JUDGED_STEPS:.1f} ms each for their images "
            f"({waited / total:.0%}), prepared by {self.workers or 'no'} worker processes: {remedy}.{later}"
        )
