"""Class folders: `DIR/train/CLASS/**.jpg` and `DIR/val/CLASS/**.jpg`, or one such tree, or images without classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill_cli.data.images import Encoded, Readable, read_file
from distill_cli.data.listing_cache import cached_listing
from distill_cli.report import Report

SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}


@dataclass(frozen=True)
class ImageFolder(Readable):
    """Image files below one folder, by their relative paths."""

    root: Path
    keys: Sequence[str]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.keys)

    def content(self, sample_id: int) -> bytes:
        return read_file(self.root / self.keys[sample_id])

    def encoded(self, sample_id: int, content: bytes) -> Encoded:
        return Encoded(content, self.root / self.keys[sample_id])


def open_folder(folder: Path, split: str, cached: bool = True, report: Report | None = None) -> ImageFolder | None:
    """Open one split of a folder; None where the folder has splits, but not this one, or has none and `val` is asked.

    Args:
        cached: read the listing of a large tree from the cache, and write it there.

    Raises:
        UsageError: no images, a class folder without any, or a link that makes a loop.
    """
    there = ((name, folder / entry) for name, entries in SPLITS.items() for entry in reversed(entries))
    named = {name: path for name, path in there if path.is_dir()}
    root = named.get(split) if named else folder if split == "train" else None
    if root is None:
        return None
    listing = cached_listing(root, cached, report)
    return ImageFolder(root, listing.keys, listing.labels, listing.classes)
