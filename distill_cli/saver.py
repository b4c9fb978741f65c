"""The checkpoints of a run: when they are due, who writes them, which of them stay, and which is gone on from."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distill_cli.checkpoint import FOLDER, Snapshot, checkpoint_path, checkpoints, load_checkpoint, step_of
from distill_cli.config import seconds_of
from distill_cli.errors import DamagedError, UsageError

Warn = Callable[[str], None]


class Due:
    """Whether a checkpoint is due between the ends of epochs: every so many steps, or so much time after the last."""

    def __init__(self, every: int | str | None) -> None:
        """
        Args:
            every: steps, or a time such as `15min`; None for never.
        """
        self._steps = every if isinstance(every, int) else None
        self._seconds = seconds_of(every) if isinstance(every, str) else None
        self._last = time.monotonic()

    def at(self, step: int) -> bool:
        if self._steps is not None:
            return step % self._steps == 0
        return self._seconds is not None and time.monotonic() - self._last >= self._seconds

    def saved(self) -> None:
        """The time begins again."""
        self._last = time.monotonic()


class Saver:
    """Writes a run's checkpoints beside the training, in a thread, and keeps the newest and the best of them."""

    def __init__(self, run: Path, keep: int, warn: Warn) -> None:
        """
        Args:
            keep: how many of the newest stay.
            warn: told of a checkpoint that could not be written; the one before stays, and the run goes on.
        """
        self.run, self.keep, self.warn = run, keep, warn
        self.best: int | None = None
        """The step whose checkpoint stays however old it gets."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint, once the one before is written."""
        self.join()
        error, self._error = self._error, None
        if isinstance(error, OSError):
            self.warn(f"{self.run}: a checkpoint was not written ({error.strerror}); the one before is intact")
        elif error is not None:
            raise error
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is on disk.

        Raises:
            OSError: it could not be written.
        """
        self.join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self.join()

    def join(self) -> None:
        """Until the thread has ended, well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            (self.run / FOLDER).mkdir(exist_ok=True)
            snapshot.write(checkpoint_path(self.run, snapshot.step))
            for path in checkpoints(self.run)[: -self.keep]:
                if step_of(path) != self.best:
                    path.unlink()
        except BaseException as error:
            self._error = error


def newest(
    run: Path, resume: str, model: nn.Module, optimizer: Optimizer, ema: nn.Module | None, warn: Warn
) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole; gives back its state, or None where there is none.

    Args:
        resume: `auto`; `never`: there must be none; `must`: there must be one.

    Raises:
        DamagedError: none is whole, or there is none and there must be.
        UsageError: there is one and there must not be.
    """
    found = checkpoints(run)
    if not found and resume == "must":
        raise DamagedError(f"{run}: has no checkpoint to go on from; leave out --resume must to begin a run")
    if found and resume == "never":
        raise UsageError(f"{run}: a run is under way at {found[-1].stem}; choose another --out, or --resume auto")
    for path in reversed(found):
        try:
            return load_checkpoint(path, model, optimizer, ema)
        except DamagedError as error:
            if path == found[0]:
                raise
            warn(f"{str(error).rpartition(';')[0]}; going back to the checkpoint before it")
    return None
