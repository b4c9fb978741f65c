"""Images that lie in one array: IDX files of the MNIST family, and the sample shipped in the package."""

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill_cli.data.images import Readable
from distill_cli.data.keys import Numbers
from distill_cli.errors import UsageError

IMAGES, LABELS = "-images-idx3-ubyte", "-labels-idx1-ubyte"
PREFIXES = {"train": ("train",), "val": ("t10k", "test", "val")}


@dataclass(frozen=True)
class ArraySource(Readable):
    """Grey images `[n, height, width]` in memory or memory-mapped, given out as RGB; a sample's key is its index."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def keys(self) -> Sequence[str]:
        return Numbers(len(self))

    def content(self, sample_id: int) -> bytes:
        return self.images[sample_id].tobytes()

    def decode(self, sample_id: int, content: bytes) -> Image.Image:
        return Image.fromarray(np.frombuffer(content, np.uint8).reshape(self.images.shape[1:])).convert("RGB")


def open_sample(split: str) -> ArraySource:
    """Open the real images shipped in the package: 1,000 + 200 of each class of Fashion-MNIST."""
    with (resources.files("distill_cli.data") / "sample.npz").open("rb") as file, np.load(file) as arrays:
        labels = arrays[f"{split}_labels"].astype(np.int64)
        return ArraySource(arrays[f"{split}_images"], labels, tuple(map(str, arrays["classes"])))


def holds_idx(folder: Path) -> bool:
    """Whether a folder holds IDX image files."""
    return any(folder.glob(f"*{IMAGES}*"))


def open_idx(folder: Path, split: str) -> ArraySource | None:
    """Open one split of an IDX folder (`train-…`; `t10k-…`, `test-…` or `val-…`); None where it is not there.

    Raises:
        UsageError: a file is not IDX, is cut short, or the labels are not one per image.
    """
    for prefix in PREFIXES[split]:
        path = _with_or_without_gz(folder / f"{prefix}{IMAGES}")
        if path is None:
            continue
        images = _read(path, dims=3)
        labels_path = _with_or_without_gz(folder / f"{prefix}{LABELS}")
        labels = None if labels_path is None else _read(labels_path, dims=1).astype(np.int64)
        if labels is not None and len(labels) != len(images):
            raise UsageError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {path.name}")
        return ArraySource(images, labels, None)
    return None


def _with_or_without_gz(path: Path) -> Path | None:
    zipped = path.with_name(f"{path.name}.gz")
    return path if path.is_file() else zipped if zipped.is_file() else None


def _read(path: Path, dims: int) -> NDArray[np.uint8]:
    """One IDX file: two zero bytes, the type (8: uint8), the number of dims, their big-endian uint32, the data."""
    try:
        content = (
            np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
            if path.suffix == ".gz"
            else np.memmap(path, np.uint8, "r")
        )
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read as an IDX file ({error}); fetch it again") from error
    header = 4 + 4 * dims
    if bytes(content[:4]) != bytes([0, 0, 8, dims]) or len(content) < header:
        raise UsageError(f"{path}: not an IDX file of uint8 with {dims} dims (starts with {bytes(content[:4])!r})")
    shape = tuple(map(int, np.frombuffer(content[4:header].tobytes(), ">u4")))
    needed = header + math.prod(shape)
    if len(content) != needed:
        raise UsageError(f"{path}: {len(content)} bytes where its header {shape} needs {needed}; fetch it again")
    if shape[0] == 0:
        raise UsageError(f"{path}: no images or labels in it; fetch it again")
    return content[header:].reshape(shape)
