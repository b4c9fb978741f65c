"""Listings of large trees, kept between runs.

CACHE/listings/<sha256 of what was listed>.npz     arrays, each with the CRC-32 of its zip member

A listing holds while every directory that it was read from has the status that it had: inode, links, size, and times of
change to the nanosecond. So a file that comes, goes or is renamed is noticed, and one whose content changes is not. A
listing is not kept if one of its directories changed within the last seconds, when another change could bear the same
time. Whatever is wrong with a cache, the tree is listed again.
"""

import contextlib
import io
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill_cli.cache import turn, user_cache
from distill_cli.data.keys import Keys
from distill_cli.data.listing import Count, Listing, list_tree
from distill_cli.files import sha256, write_atomic
from distill_cli.report import Report

VERSION = 1
LARGE = 50_000
"""Images from which on a listing is kept and its progress shown."""
SETTLED_S = 2.0

Arrays = Mapping[str, NDArray[np.generic]]


def cached_listing(root: Path, cached: bool = True, report: Report | None = None) -> Listing:
    """List a tree, or read its listing where it is kept and still holds.

    Raises:
        as `list_tree`.
    """
    root = root.absolute()
    arrays = load(f"tree {root}") if cached else None
    listing = None if arrays is None else _unpack(root, arrays)
    if listing is None:
        before = time.time()
        with shown(report, root) as count:
            listing = list_tree(root, count)
        if cached and len(listing.keys) >= LARGE:
            _keep(root, listing, before)
    return listing


def load(what: str) -> dict[str, NDArray[np.generic]] | None:
    """The arrays that are kept of something listed; None where there are none, or they are damaged."""
    # A damaged archive makes numpy and zipfile raise all sorts of errors.
    with contextlib.suppress(Exception), _path(what).open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = dict(archive)
        if int(arrays.pop("version")) == VERSION:
            return arrays
    return None


def keep(what: str, arrays: Arrays) -> None:
    """Keep the arrays of something listed; without a word where the cache cannot be written."""
    buffer = io.BytesIO()
    np.savez(buffer, version=np.array(VERSION), **arrays)  # type: ignore[arg-type]
    path = _path(what)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with turn(path.parent, path.stem):
            write_atomic(path, buffer.getvalue())


def pack(name: str, keys: Keys) -> dict[str, NDArray[np.generic]]:
    """Names as two arrays."""
    return {name: np.frombuffer(keys.joined, np.uint8), f"{name}_ends": keys.ends}


def unpack(name: str, arrays: Arrays) -> Keys:
    """Names from two arrays.

    Raises:
        ValueError, KeyError: they do not fit each other.
    """
    joined, ends = arrays[name].tobytes(), arrays[f"{name}_ends"].astype(np.int64)
    if (np.diff(ends, prepend=-1) < 1).any() or len(joined) != (ends[-1] if len(ends) else 0):
        raise ValueError(f"{name}: ends out of order")
    return Keys(joined, ends)


def _path(what: str) -> Path:
    return user_cache() / "listings" / f"{sha256(what.encode(errors='surrogateescape'))}.npz"


def _keep(root: Path, listing: Listing, before: float) -> None:
    with contextlib.suppress(OSError):
        status = _status(root, listing.folders)
        if status[:, -2:].max() < (before - SETTLED_S) * 1e9:
            classes = {} if listing.classes is None else pack("classes", Keys.of(listing.classes))
            names = {**pack("keys", listing.keys), **pack("folders", Keys.of(listing.folders)), **classes}
            keep(f"tree {root}", {**names, "sizes": listing.sizes, "status": status})


def _unpack(root: Path, arrays: Arrays) -> Listing | None:
    """The listing, if it still holds."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        folders = tuple(unpack("folders", arrays))
        if np.array_equal(_status(root, folders), arrays["status"]):
            keys, sizes = unpack("keys", arrays), arrays["sizes"].astype(np.int64)
            classes = tuple(unpack("classes", arrays)) if "classes" in arrays else None
            if sizes.sum() == len(keys) and len(sizes) == len(classes or [""]):
                return Listing(keys, sizes, classes, folders)
    return None


def _status(root: Path, folders: tuple[str, ...]) -> NDArray[np.int64]:
    """Per directory: inode, links, size, and the times of the last change of its content and of itself."""
    found = [os.stat(os.path.join(root, folder)) for folder in folders]  # noqa: PTH116, PTH118
    return np.array([(s.st_ino, s.st_nlink, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found], np.uint64).view(
        np.int64
    )


@contextlib.contextmanager
def shown(report: Report | None, what: object) -> Iterator[Count]:
    """Progress, once there is something to wait for."""
    with contextlib.ExitStack() as stack:
        total, progress = 0, None

        def count(files: int) -> None:
            nonlocal total, progress
            total += files
            if report is not None and progress is None and total >= LARGE:
                progress = stack.enter_context(report.progress(f"listing {what}", None, unit="files"))
                files = total
            if progress is not None:
                progress.advance(files)

        yield count
