"""What a trainer refuses, by kind. The command line prints the message alone, without a traceback."""

from __future__ import annotations

import re
import sys
import traceback


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


class OtherProcessError(TrainerError):
    """Another process failed, and has said why."""


def refuse(error: BaseException) -> int:
    """Print what was refused on one line that begins with `error:`; returns the exit status that goes with it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # some libraries colour their messages
    text = re.sub(r"\s*\n\s*", " ", text.strip()) or type(error).__name__
    print(f"error: {text}", file=sys.stderr)
    return getattr(error, "exit_code", 1)


def reason(error: BaseException, *, where: bool = True) -> str:
    """Kind, first line and place of an error that nobody foresaw, such as one in a network of the user's own."""
    frames = traceback.extract_tb(error.__traceback__)
    # What the reader can mend is the innermost line outside the libraries.
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    place = f", in {own[-1].filename}, line {own[-1].lineno}" if own and where else ""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}{place}"
