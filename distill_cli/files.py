"""Directories that are filled atomically: temporary name, fsync, rename."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_cli.errors import UsageError

LOCK, TEMPORARY = ".lock", ".tmp-"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that `path` holds either all of `content` or what it held before.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with named(path):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(path.parent)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Around what is written to `path`: a full disk does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name to write a long file under; it becomes `path` if the block ends well, and is gone otherwise."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically: equal values are equal bytes."""
    write_atomic(path, canonical_json(value, indent=2) + "\n")


def canonical_json(value: Any, indent: int | None = None) -> str:
    """JSON in ASCII with sorted keys; equal values give equal text, and any file name has one."""
    return json.dumps(value, sort_keys=True, indent=indent, allow_nan=False)


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed writer left half-written below `folder`; call it with the folder locked."""
    for leftover in folder.rglob(f"{TEMPORARY}*"):
        leftover.unlink()


def sha256(content: bytes | memoryview | str) -> str:
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


def check_ours(folder: Path, marks: tuple[str, ...], what: str, option: str = "--out") -> None:
    """Refuse a directory that has files in it but none of `marks`: it is somebody else's.

    Args:
        option: that names it.

    Raises:
        UsageError: the path is a file, or holds other things than a `what`.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; {option} names the directory of a {what}")
    if folder.is_dir():
        names = {entry.name for entry in folder.iterdir() if not entry.name.startswith((LOCK, TEMPORARY))}
        if names and not names & set(marks):
            raise UsageError(f"{folder}: is not empty and not a {what}; choose another {option}")


def fsync_directory(folder: Path) -> None:
    """Make the names in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
