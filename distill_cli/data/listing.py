"""The sorted listing of a tree of image files: its keys, class by class, and the directories that it was read from."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill_cli.data.images import EXTENSIONS, printable
from distill_cli.data.keys import Keys
from distill_cli.errors import UsageError

Count = Callable[[int], None]
"""Told how many more files were found."""


@dataclass(frozen=True)
class Listing:
    """What a tree holds."""

    keys: Keys
    """Paths below the root: class by class, sorted by code point within each."""
    sizes: NDArray[np.int64]
    """Images of each class."""
    classes: tuple[str, ...] | None
    """None where the tree has no class folders."""
    folders: tuple[str, ...]
    """Every directory that was read, relative to the root."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        return None if self.classes is None else np.repeat(np.arange(len(self.sizes)), self.sizes)


def list_tree(root: Path, count: Count = lambda files: None) -> Listing:
    """List the images below a folder.

    Raises:
        UsageError: no images, a class folder without any, or a link that leads back to where it came from.
    """
    folders = [""]
    classes = sorted(e.name for e in _entries(root, "") if e.is_dir() and not e.name.startswith("."))
    parts = [_images(root, f"{name}/" if name else "", folders, count) for name in classes or [""]]
    for name, part in zip(classes or [""], parts, strict=True):
        if not len(part):
            raise _nothing(root, name)
    sizes = np.array([len(part) for part in parts], np.int64)
    return Listing(Keys.chain(parts), sizes, tuple(classes) or None, tuple(folders))


def _images(root: Path, start: str, folders: list[str], count: Count) -> Keys:
    """The sorted paths below one folder, which begin with its own."""
    found: list[str] = []
    waiting = [start]
    if start and (root / start).is_symlink():
        _check_no_loop(root, start)
    while waiting:
        folder, known = waiting.pop(), len(found)
        if folder:
            folders.append(folder)
        for entry in _entries(root, folder):
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_dir():
                waiting.append(f"{folder}{name}/")
                if entry.is_symlink():
                    _check_no_loop(root, waiting[-1])
            elif name.lower().endswith(EXTENSIONS):
                found.append(folder + name)
        count(len(found) - known)
    return Keys.of(sorted(found))


def _entries(root: Path, folder: str) -> Iterator[os.DirEntry[str]]:
    path = os.path.join(root, folder)  # noqa: PTH118
    try:
        with os.scandir(path) as entries:
            yield from entries
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"{printable(path)}: cannot be listed ({reason}); make it readable, or remove it") from error


def _check_no_loop(root: Path, link: str) -> None:
    path = root / link
    there = path.resolve()
    if path.parent.resolve().is_relative_to(there):
        raise UsageError(f"{printable(path)}: links back to {printable(there)}, which it is in; remove the link")


def _nothing(root: Path, name: str) -> UsageError:
    if name:
        return UsageError(f"{printable(root / name)}: no images in this class folder; add some, or remove the folder")
    return UsageError(
        f"{printable(root)}: no images ({' '.join(EXTENSIONS)}); give a folder of class folders or of images"
    )
