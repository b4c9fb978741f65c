"""Class folders: `DIR/train/CLASS/**.jpg` and `DIR/val/CLASS/**.jpg`, or one such tree, or images without classes."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill_cli.data.sources import UnreadableImage
from distill_cli.errors import UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}


@dataclass(frozen=True)
class ImageFolder:
    """Image files below one folder, sorted by their relative path."""

    root: Path
    keys: Sequence[str]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, sample_id: int) -> Image.Image:
        path = self.root / self.keys[sample_id]
        try:
            with Image.open(path) as image:
                return _as_rgb(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = " ".join(str(error).replace(str(path), "the file").split())
            raise UnreadableImage(
                f"{path}: cannot be decoded ({reason}); replace it, or go on without it by --skip-unreadable"
            ) from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """RGB of any kind of image; Pillow itself clips 16 bits to 8, where the high byte is meant."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def open_folder(folder: Path, split: str) -> ImageFolder | None:
    """Open one split of a folder; None where the folder has splits, but not this one, or has none and `val` is asked.

    Raises:
        UsageError: no images, or a class folder without any.
    """
    there = ((name, folder / entry) for name, entries in SPLITS.items() for entry in reversed(entries))
    named = {name: path for name, path in there if path.is_dir()}
    if named:
        return _list_tree(named[split]) if split in named else None
    return _list_tree(folder) if split == "train" else None


def _list_tree(root: Path) -> ImageFolder:
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        keys = sorted(_images(root, ""))
        if not keys:
            raise UsageError(f"{root}: no images ({' '.join(EXTENSIONS)}); give a folder of class folders or of images")
        return ImageFolder(root, keys, None, None)
    keys, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(_images(root / name, f"{name}/"))
        if not found:
            raise UsageError(f"{root / name}: no images in this class folder; add some, or remove the folder")
        keys += found
        labels += [label] * len(found)
    return ImageFolder(root, keys, np.array(labels, np.int64), tuple(classes))


def _images(folder: Path, prefix: str) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(EXTENSIONS):
            yield prefix + entry.name
