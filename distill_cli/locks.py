"""Who works on a directory: one process alone, or several that share its pieces. The kernel keeps the locks.

DIR/.lock is locked by the byte, with record locks, which end with their process however it ends, and which hold over
NFS too. (A flock would be inherited by loader workers, who would hold on to it.)

    byte 0        shared by all who work there; one who works alone locks all bytes
    byte 1        the desk: who writes what concerns all
    byte 2 + n    piece n

The file names who came since somebody last had the directory to himself. It goes with the last one.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from distill_cli.errors import BusyError, UsageError
from distill_cli.files import LOCK

WAIT_S = 1.0
"""The one before may still be leaving."""
_DESK, _PIECES = 1, 2
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_held: set[Path] = set()
"""Files that this process has locked: the kernel would give it the lock twice."""


class Claims:
    """What this process holds of a directory that it shares."""

    def __init__(self, file: IO[str] | None) -> None:
        """
        Args:
            file: DIR/.lock; None where the file system has no locks and every claim is granted.
        """
        self._file = file

    def claim(self, piece: int) -> bool:
        """Hold a piece, unless another process does."""
        return self._file is None or _lock(self._file, fcntl.LOCK_EX, _PIECES + piece, 1)

    def release(self, piece: int) -> None:
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _PIECES + piece)

    @contextlib.contextmanager
    def desk(self) -> Iterator[None]:
        """Wait for one's turn to write what concerns all."""
        if self._file is None:
            yield
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _DESK)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _DESK)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and have it alone.

    Raises:
        BusyError: another process works there; the message names its pid and host.
    """
    with _opened(folder, fcntl.LOCK_EX, 0) as file:
        file.truncate(0)
        _sign(file)
        yield


@contextlib.contextmanager
def shared(
    folder: Path, without_locks: bool = False, advice: str = "give each process its own part by --shards A:B"
) -> Iterator[Claims]:
    """Make `folder` and work there beside others who share it.

    Args:
        without_locks: where the file system has no locks, go on without.
        advice: to who may not.

    Raises:
        BusyError: another process has it alone.
        UsageError: the file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(_opened(folder, fcntl.LOCK_SH, 1))
            if _lock(file, fcntl.LOCK_EX, 0, 0):
                file.truncate(0)
                fcntl.lockf(file, fcntl.LOCK_SH, 1, 0)
                fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)
            _sign(file)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if not without_locks:
                raise UsageError(f"{folder}: its file system has no locks; {advice}") from error
            file = None
        yield Claims(file)


def holder_of(folder: Path) -> str | None:
    """Who works in a directory, or None."""
    if folder.resolve() / LOCK in _held:
        return "this process"
    try:
        with (folder / LOCK).open("r+") as file:
            return None if _lock(file, fcntl.LOCK_EX, 0, 0) else _names(file)
    except OSError:
        return None


@contextlib.contextmanager
def _opened(folder: Path, kind: int, length: int) -> Iterator[IO[str]]:
    """DIR/.lock, with its first `length` bytes (0: all) locked."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    if path in _held:
        # Not even to be opened: closing it again would end the locks that this process has.
        raise BusyError(f"{folder}: held by this process; wait for it, or choose another --out")
    deadline = time.monotonic() + WAIT_S
    while True:
        with path.open("a+") as file:
            if not _lock(file, kind, 0, length):
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                raise BusyError(f"{folder}: held by {_names(file)}; wait for it, or choose another --out")
            # The holder before us removes the file as it leaves: then this lock is on a name that is gone.
            if not _is_at(path, file.fileno()):
                continue
            _held.add(path)
            try:
                yield file
            finally:
                # Let go first: of two who leave at once neither would have the file to himself.
                fcntl.lockf(file, fcntl.LOCK_UN)
                if _lock(file, fcntl.LOCK_EX, 0, 0) and _is_at(path, file.fileno()):
                    path.unlink()
                _held.discard(path)
            return


def _sign(file: IO[str]) -> None:
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def _names(file: IO[str]) -> str:
    file.seek(0)
    return ", ".join(file.read().split("\n")[:-1]) or "another process"


def _lock(file: IO[str], kind: int, first: int, length: int) -> bool:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB, length, first)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
