"""Directories that are filled atomically: temporary name, fsync, rename; one holder at a time."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_cli.errors import BusyError, UsageError

LOCK = ".lock"
_TEMPORARY = ".tmp-"
_held: set[Path] = set()
"""Locks of this process, which the kernel would give it twice."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that `path` holds either all of `content` or what it held before.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):
            # A full disk does not say which file it was.
            error.filename = str(path)
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically: equal values are equal bytes."""
    write_atomic(path, canonical_json(value, indent=2) + "\n")


def canonical_json(value: Any, indent: int | None = None) -> str:
    """JSON in ASCII with sorted keys; equal values give equal text, and any file name has one."""
    return json.dumps(value, sort_keys=True, indent=indent, allow_nan=False)


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed writer left half-written below `folder`; call it with the folder locked."""
    for leftover in folder.rglob(f"{_TEMPORARY}*"):
        leftover.unlink()


def sha256(content: bytes | str) -> str:
    """The sha256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Free disk space where `path` is, or would be made."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_ours(folder: Path, marks: tuple[str, ...], what: str) -> None:
    """Refuse a directory that has files in it but none of `marks`: it is somebody else's.

    Raises:
        UsageError: the path is a file, or holds other things than a `what`.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; --out names the directory of a {what}")
    if folder.is_dir():
        names = {entry.name for entry in folder.iterdir() if not entry.name.startswith((LOCK, _TEMPORARY))}
        if names and not names & set(marks):
            raise UsageError(f"{folder}: is not empty and not a {what}; choose another --out")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it: the kernel frees the lock when the process ends, however it ends.

    Raises:
        BusyError: another process holds it; the message names its pid and host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    while True:
        with path.open("a+") as file:
            try:
                if path in _held:
                    raise BlockingIOError
                # A record lock, which ends with its process; loader workers would inherit a flock and hold on to it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise BusyError(f"{folder}: held by {holder}; wait for it, or choose another --out") from None
            # The holder before us removes the file as it leaves: then this lock is on a name that is gone.
            if not _is_at(path, file.fileno()):
                continue
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            _held.add(path)
            try:
                yield
            finally:
                _held.discard(path)
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _fsync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
