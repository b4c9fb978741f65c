"""Every error that a user can meet, and the exit code that it ends the process with.

    DistillError        1    failed while running
    ├── UsageError      2    the command line or the recipe is wrong
    ├── MismatchError   3    the store, the recipe, the data or the teacher is not the one expected
    ├── DamagedError    4    a store or a checkpoint is incomplete or damaged
    ├── GateError       5    a gate was not met (`eval --fail-below`)
    ├── BusyError      75    another process holds the directory
    └── Stopped       130    SIGINT (143: SIGTERM, SIGUSR1); what could be saved is saved

A message is one sentence: where, what was found, what to do.
"""

import difflib
import signal
from collections.abc import Iterable


class DistillError(Exception):
    """Failed while running."""

    exit_code = 1


class UsageError(DistillError):
    """The command line or the recipe is wrong."""

    exit_code = 2


class MismatchError(DistillError):
    """The store, the recipe, the data or the teacher is not the one expected."""

    exit_code = 3


class DamagedError(DistillError):
    """A store or a checkpoint is incomplete or damaged."""

    exit_code = 4


class GateError(DistillError):
    """A gate was not met."""

    exit_code = 5


class BusyError(DistillError):
    """Another process holds the directory."""

    exit_code = 75


class Stopped(DistillError):
    """A signal ended the work after the step in hand."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        # SLURM warns by a signal of choice before it sends SIGTERM: it is the same end.
        self.exit_code = 128 + (signal.SIGTERM if signum == signal.SIGUSR1 else signum)


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """The end of a sentence that names the known names nearest to `name`: `; did you mean a, b?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else ""
