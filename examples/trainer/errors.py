"""What a trainer refuses, by kind. The command line prints the message alone, without a traceback."""

from __future__ import annotations

import re
import sys


class TrainerError(Exception):
    """Base of everything that the trainers refuse; `exit_code` is the process's exit status."""

    exit_code = 1


class OptionError(TrainerError, ValueError):
    """An option, or two options together, cannot be honoured."""

    exit_code = 2


class DatasetError(TrainerError):
    """The images are missing, unreadable, or not laid out as they should be."""


class ResumeError(TrainerError):
    """The run in `--output` is another run than the one asked for."""


class CheckpointError(TrainerError):
    """A checkpoint is damaged, foreign, or does not fit the run."""


class NonFiniteLossError(TrainerError):
    """The loss or its gradient became NaN or infinite; nothing was updated or overwritten."""


def refuse(error: BaseException) -> int:
    """Print what was refused on one line that begins with `error:`.

    Args:
        error: What was raised.

    Returns:
        The exit status that goes with it.
    """
    text = re.sub(r"\s*\n\s*", " ", str(error).strip()) or type(error).__name__
    print(f"error: {text}", file=sys.stderr)
    return getattr(error, "exit_code", 1)
