"""How a program of this folder starts, pauses and ends: its options, signals, and every refusal on one line.

Only the standard library is imported at once, so that a missing package can be named and `--help` is quick.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.errors import OptionError, OtherProcessError, TrainerError, reason, refuse

if TYPE_CHECKING:
    from typing_extensions import Self

    from trainer.config import Config

# Set, it makes an error that nobody foresaw show where it came from.
TRACEBACK = "GRADCONSIST_TRACEBACK"


class Parser(argparse.ArgumentParser):
    """A command line whose description keeps its lines, and whose refusals are one line."""

    def __init__(self, program: str, description: str | None) -> None:
        super().__init__(
            prog=program, description=description, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        raise SystemExit(refuse(OptionError(f"{message} (--help lists the options)")))

    def add_count(self, name: str, default: int, text: str) -> None:
        """Add an option that is a whole number above 0."""
        self.add_argument(name, type=_count, default=default, help=f"{text}; default: {default}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; found {text}")
    return int(text)


def guarded(action: Callable[[], int], extra: str = "examples") -> int:
    """Run a program, and turn whatever it raises into one line and an exit status."""
    for stream in (sys.stdout, sys.stderr):  # names in any script, on any terminal
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with Interrupts():
            return action()
    except OtherProcessError as error:  # that process has said why
        return error.exit_code
    except BrokenPipeError:  # the reader, such as `head`, has enough
        sys.stderr.close()  # else Python complains about it at its end
        return 0
    except KeyboardInterrupt:  # while a run takes steps, it answers this with a checkpoint
        print("interrupted; what is in the output folder is whole.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        text = f"{error.name} is not installed, which this program needs: "
        return refuse(OptionError(f"{text}pip install '.[{extra}]' in the project's folder."))
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        if isinstance(error, TrainerError | OSError) or type(error).__module__.startswith("gradconsist."):
            return refuse(error)
        return refuse(TrainerError(f"{reason(error)} ({TRACEBACK}=1 in the environment shows the whole way there)"))


def start(program: str, description: str, presets: str) -> int:
    """Parse the command line and train."""

    def action() -> int:
        from trainer import cli, config

        options = cli.parse_config(sys.argv[1:], getattr(config, presets), program=program, description=description)
        from trainer import training  # only now: it imports torch, which --help does without

        return training.main(options)

    return guarded(action)


class Signals:
    """Notes SIGINT and SIGTERM instead of ending of them."""

    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if Interrupts.raised:  # and nothing came of it
            raise KeyboardInterrupt
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
            for number in self.numbers:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


class Interrupts(Signals):
    """Raises at Ctrl-C and remembers it: libraries, mpmath for one, take that for an error of their own and go on."""

    numbers = (signal.SIGINT,)
    raised = False

    def __exit__(self, *exception: object) -> None:
        super().__exit__()
        Interrupts.raised = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        Interrupts.raised = True
        raise KeyboardInterrupt


class StopRequest(Signals):
    """When a run pauses before its last step: at a signal (a second one kills), or after some steps or minutes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.steps, self.minutes = config.stop_after_steps, config.stop_after_minutes
        self.started, self.taken = time.monotonic(), 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        super()._receive(number, frame)
        self.__exit__()

    @property
    def exit_code(self) -> int:
        """Exit status of the process: 0, or 128 + the signal's number."""
        return 128 + self.received[0] if self.received else 0

    def after_step(self) -> str | None:
        """Count a step; return why to stop, or None."""
        self.taken += 1
        if self.received:
            return signal.Signals(self.received[0]).name
        if self.steps is not None and self.taken >= self.steps:
            return f"--stop-after-steps {self.steps}"
        if self.minutes is not None and time.monotonic() - self.started >= 60 * self.minutes:
            return f"--stop-after-minutes {self.minutes:g}"
        return None
