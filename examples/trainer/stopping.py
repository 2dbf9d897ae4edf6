"""When a run pauses before its last step: a signal, or a budget of steps or minutes."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from trainer.config import Config


class StopRequest:
    """Turns SIGINT and SIGTERM into a question that the loop asks after each step; a second signal kills.

    Attributes:
        exit_code: 0, or 128 + the signal's number.
    """

    def __init__(self, config: Config) -> None:
        self.steps, self.minutes = config.stop_after_steps, config.stop_after_minutes
        self.started, self.taken = time.monotonic(), 0
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for known, handler in self._previous.items():
            signal.signal(known, handler)

    @property
    def exit_code(self) -> int:
        """Exit status of the process."""
        return 0 if self.received is None else 128 + self.received

    def after_step(self) -> str | None:
        """Count a step; return why to stop, or None."""
        self.taken += 1
        if self.received is not None:
            return signal.Signals(self.received).name
        if self.steps is not None and self.taken >= self.steps:
            return f"--stop-after-steps {self.steps}"
        if self.minutes is not None and time.monotonic() - self.started >= 60 * self.minutes:
            return f"--stop-after-minutes {self.minutes:g}"
        return None
