"""WebDataset tars, local or behind a URL: each image is read by its place in its tar.

A tar is indexed once; the index is kept where listings are. A tar behind a URL is fetched whole into the user's cache,
and taken to stay what it is. Captures and training read few tars at a time, so that the cache may be small.
"""

import contextlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill_cli.cache import FileCache, user_cache
from distill_cli.data.images import Encoded, Readable, check_size, unreadable
from distill_cli.data.keys import Keys, first_double
from distill_cli.data.labels import from_text
from distill_cli.data.listing_cache import Count, keep, load, shown
from distill_cli.data.tar_names import tar_names
from distill_cli.data.tars import TarIndex, index_tar
from distill_cli.errors import UsageError
from distill_cli.files import sha256
from distill_cli.report import Report
from distill_cli.server import Server

KEPT = 1000
"""Images from which on the index of a local tar is kept; that of one behind a URL always is."""


@dataclass(frozen=True)
class Tars:
    """Tars by their paths or URLs."""

    names: tuple[str, ...]
    cache: FileCache
    """Of those behind URLs."""

    def path(self, number: int) -> Path:
        """The local file of a tar; one behind a URL is fetched if it is not there.

        Raises:
            UsageError: there is no such tar, or nothing that reads such URLs.
            DistillError: the server cannot be read.
        """
        name = self.names[number]
        if "://" not in name:
            return Path(name)
        url, _, last = name.rpartition("/")

        def fetch(temporary: Path) -> None:
            try:
                Server(url).ask(last, lambda system, source: system.get_file(source, str(temporary)))
            except FileNotFoundError as error:
                raise UsageError(f"{name}: there is no such tar") from error

        return self.cache.file(sha256(name), fetch)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Some bytes of a tar.

        Raises:
            as `path`; OSError: it cannot be read.
        """
        for last in (False, True):
            try:
                file = os.open(self.path(number), os.O_RDONLY)
                break
            except FileNotFoundError:
                # Another process may have let go of it since, for the bound of the cache.
                if last or "://" not in self.names[number]:
                    raise
        try:
            return os.pread(file, size, offset)
        finally:
            os.close(file)


@dataclass(frozen=True)
class TarSource(Readable):
    """Images in tars; a sample's key is the tar's name without `.tar`, a slash, and its key in the tar."""

    tars: Tars
    keys: Sequence[str]
    tar: NDArray[np.int32]
    """Per sample: the number of its tar."""
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def parts(self) -> tuple[int, ...]:
        """Samples of each tar; none is without."""
        return tuple(np.bincount(self.tar).tolist())

    def content(self, sample_id: int) -> bytes:
        number, size = int(self.tar[sample_id]), int(self.sizes[sample_id])
        check_size(size, self._name(sample_id))
        try:
            content = self.tars.read(number, int(self.offsets[sample_id]), size)
        except OSError as error:
            raise unreadable(self._name(sample_id), error) from error
        if len(content) != size:
            raise unreadable(self._name(sample_id), "the tar is shorter than it was")
        return content

    def encoded(self, sample_id: int, content: bytes) -> Encoded:
        return Encoded(content, self._name(sample_id))

    def _name(self, sample_id: int) -> str:
        return f"{self.tars.names[int(self.tar[sample_id])]}: {self.keys[sample_id]}"


def open_tars(
    pattern: str, split: str, cached: bool = True, most_bytes: float | None = None, report: Report | None = None
) -> TarSource | None:
    """Open the tars of a pattern, or one split of a folder of tars; None where there is no such split.

    Args:
        pattern: a path or URL with `{000..146}`, `{a,b}` or `*`; or a folder.
        cached: keep the index of each tar.
        most_bytes: of fetched tars that are kept.

    Raises:
        UsageError: no such tars; one is damaged; keys are there twice; some tars have labels and others not.
    """
    names = tar_names(pattern, split)
    if names is None:
        return None
    stems = [name.rpartition("/")[2].removesuffix(".tar") for name in names]
    double = first_double(stems)
    if double is not None:
        raise UsageError(f"--data wds:{pattern}: two tars are named {double}.tar; give each a name of its own")
    tars = Tars(tuple(names), FileCache(user_cache() / "tars", ".tar", most_bytes))
    with shown(report, f"wds:{pattern}") as count:
        indices = [_index(tars, number, cached, count) for number in range(len(names))]
    return _source(tars, stems, indices)


def _source(tars: Tars, stems: Sequence[str], indices: Sequence[TarIndex]) -> TarSource:
    labels, classes = None, None
    bare = [index.labels is None for index in indices]
    if not any(bare):
        text = [label for index in indices for label in index.labels or ()]
        labels, classes = from_text(text, tars.names[0])
    elif not all(bare):
        raise UsageError(f"{tars.names[bare.index(True)]}: has no labels, other tars have; or give data.labelled=false")
    keys = Keys.of(f"{stem}/{key}" for stem, index in zip(stems, indices, strict=True) for key in index.keys)
    numbers = np.repeat(np.arange(len(indices), dtype=np.int32), [len(index) for index in indices])
    offsets, sizes = (np.concatenate([getattr(index, name) for index in indices]) for name in ("offsets", "sizes"))
    return TarSource(tars, keys, numbers, offsets, sizes, labels, classes)


def _index(tars: Tars, number: int, cached: bool, count: Count) -> TarIndex:
    name = tars.names[number]
    if "://" in name:
        what = f"tar {name}"
    else:
        status = _status(name)
        what = f"tar {Path(name).absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    arrays = load(what) if cached else None
    if arrays is not None:
        with contextlib.suppress(KeyError, ValueError):
            return TarIndex.from_arrays(arrays)
    index = index_tar(tars.path(number), name, count)
    if cached and ("://" in name or len(index) >= KEPT):
        keep(what, index.arrays())
    return index


def _status(name: str) -> os.stat_result:
    try:
        status = Path(name).stat()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"{name}: {reason}; give the tars that there are") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{name}: is no file; give the tars that there are")
    return status
