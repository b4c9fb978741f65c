"""HDF5 files: `images` with `labels` or without, at the root or in the groups `train` and `val`.

`images` is uint8 `[n, height, width, 3]` or `[n, height, width]`, or n encoded files (JPEG, PNG, …) as bytes of any
length. A file is opened by the process that reads it: its handle is never pickled, and closed before a fork.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill_cli.data.folder import SPLITS
from distill_cli.data.images import Encoded, Readable, unreadable
from distill_cli.data.keys import Numbers
from distill_cli.data.labels import Labels, from_numbers, from_text
from distill_cli.errors import UsageError

SUFFIXES = (".h5", ".hdf5")
IMAGES, LABELS = "images", "labels"

_files: dict[Path, Any] = {}
"""Those that this process has open."""


@dataclass(frozen=True)
class Hdf5Source(Readable):
    """The images of one dataset; a sample's key is its index."""

    path: Path
    dataset: str
    count: int
    shape: tuple[int, ...] | None
    """Of each, where they are arrays; None where they are encoded."""
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return self.count

    @property
    def keys(self) -> Sequence[str]:
        return Numbers(self.count)

    def content(self, sample_id: int) -> bytes:
        try:
            stored = _opened(self.path)[self.dataset][sample_id]
        except (OSError, KeyError, ValueError) as error:
            raise unreadable(self._name(sample_id), error) from error
        return stored if isinstance(stored, bytes) else stored.tobytes()

    def encoded(self, sample_id: int, content: bytes) -> Encoded | None:
        return Encoded(content, self._name(sample_id)) if self.shape is None else None

    def decode(self, sample_id: int, content: bytes) -> Image.Image:
        if self.shape is None:
            return super().decode(sample_id, content)
        return Image.fromarray(np.frombuffer(content, np.uint8).reshape(self.shape)).convert("RGB")

    def _name(self, sample_id: int) -> str:
        return f"{self.path}: {self.dataset}[{sample_id}]"


def open_hdf5(path: Path, split: str) -> Hdf5Source | None:
    """Open one split of an HDF5 file; None where it has no such split.

    Raises:
        UsageError: it cannot be read, or has no images of a kind that is read here.
    """
    try:
        with _open(path) as file:
            names = [name for name in SPLITS[split] if f"{name}/{IMAGES}" in file]
            if IMAGES in file and split == "train":
                return _source(path, file, "")
            if not names and not any(f"{name}/{IMAGES}" in file for values in SPLITS.values() for name in values):
                if IMAGES in file:
                    return None
                raise UsageError(f'{path}: has no dataset "{IMAGES}", nor "train/{IMAGES}"; there is {_content(file)}')
            return _source(path, file, f"{names[0]}/") if names else None
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as HDF5 ({' '.join(str(error).split())}); fetch it again") from error


def _source(path: Path, file: Any, group: str) -> Hdf5Source:
    images, where = file[group + IMAGES], f"{path}: {group}{IMAGES}"
    if not hasattr(images, "dtype"):
        raise UsageError(f"{where}: is a group; give one dataset of images")
    encoded = _is_encoded(images)
    if not encoded and (images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,))):
        raise UsageError(
            f"{where}: is {images.dtype} of shape {images.shape}; give uint8 [n, height, width, 3] or "
            "[n, height, width], or encoded images as bytes"
        )
    if not len(images):
        raise UsageError(f"{where}: no images in it; fetch it again")
    labels, classes = None, None
    if group + LABELS in file:
        labels, classes = _labels(file[group + LABELS], f"{path}: {group}{LABELS}")
        if len(labels) != len(images):
            raise UsageError(f"{path}: {len(labels)} {group}{LABELS} for {len(images)} {group}{IMAGES}")
    shape = None if encoded else images.shape[1:]
    return Hdf5Source(path, group + IMAGES, len(images), shape, labels, classes)


def _is_encoded(images: Any) -> bool:
    """Whether each is a file of some bytes: variable length, bytes, or opaque."""
    import h5py

    kind = images.dtype
    return images.ndim == 1 and (h5py.check_vlen_dtype(kind) == np.uint8 or kind.kind in "SV" or _is_text(kind))


def _is_text(kind: Any) -> bool:
    import h5py

    return h5py.check_string_dtype(kind) is not None


def _labels(dataset: Any, where: str) -> Labels:
    if _is_text(dataset.dtype):
        return from_text([value.decode(errors="surrogateescape") for value in dataset[:]], where)
    return from_numbers(dataset[()], where), None


def _content(file: Any) -> str:
    return ", ".join(list(file)[:10]) or "nothing"


def _open(path: Path) -> Any:
    import h5py

    return h5py.File(path, "r", locking=False)


def _opened(path: Path) -> Any:
    """The file, open in this process."""
    _close_before_forks()
    if path not in _files:
        _files[path] = _open(path)
    return _files[path]


@functools.cache
def _close_before_forks() -> None:
    # HDF5 finds a file that is open already, in a child too, and both would move one position.
    os.register_at_fork(before=_close)


def _close() -> None:
    while _files:
        _files.popitem()[1].close()
