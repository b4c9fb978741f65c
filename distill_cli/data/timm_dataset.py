"""What timm's `create_dataset` opens at random and offline, such as `timm:torch/cifar10`, `timm:torch/image_folder`.

Differs: timm goes on with the next image where one does not decode, and takes `root` itself where it has no folder of
the split; here the image is named, and there is no such split. What streams (tfds, hfids, wds) has no sample ids.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill_cli.data.folder import ImageFolder
from distill_cli.data.images import Readable, as_rgb, unreadable
from distill_cli.data.keys import Keys, Numbers
from distill_cli.data.labels import from_numbers
from distill_cli.errors import UsageError

ELSEWHERE = {"hfds": "hf:DIR", "hfids": "hf:DIR", "tfds": "class folders", "wds": "wds:PATTERN"}
FOLDERS = ("", "image_folder", "folder")
VAL = ("val", "valid", "validation", "eval", "evaluation")


@dataclass(frozen=True)
class TimmSource(Readable):
    """A data set of torchvision that holds its images itself; a sample's key is its index."""

    name: str
    dataset: Any
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def keys(self) -> Sequence[str]:
        return Numbers(len(self))

    def content(self, sample_id: int) -> bytes:
        """Width and height (uint32) and the pixels: the data set itself decodes."""
        try:
            image = as_rgb(self.dataset[sample_id][0])
        except Exception as error:
            raise unreadable(f"{self.name}[{sample_id}]", error) from error
        return struct.pack("<2I", *image.size) + image.tobytes()

    def decode(self, sample_id: int, content: bytes) -> Image.Image:
        return Image.frombytes("RGB", struct.unpack("<2I", content[:8]), content[8:])


def open_timm(name: str, split: str, root: str | None) -> TimmSource | ImageFolder | None:
    """Open one split; None where the data set has no such split.

    Raises:
        UsageError: timm has no such data set, or it is not there; nothing is downloaded.
    """
    said, kind = f"--data timm:{name}", name.lower().partition("/")[0] if "/" in name else ""
    if kind in ELSEWHERE:
        raise UsageError(f"{said}: streams or downloads; give {ELSEWHERE[kind]} of what is on disk")
    if root is None:
        raise UsageError(f"{said}: data.root is missing; say where it is by --set data.root=DIR")
    of_folders = name.lower().rpartition("/")[2] in FOLDERS
    if of_folders and split == "val" and not any((Path(root) / entry).is_dir() for entry in VAL):
        return None
    dataset = _create(name, split, root, said)
    if not len(dataset):
        raise UsageError(f"{said}: no images below {root}")
    reader = getattr(dataset, "reader", dataset)
    samples = _samples(reader)
    if samples is None:
        classes = getattr(dataset, "classes", None)
        return TimmSource(f"timm:{name}", dataset, _targets(dataset, said), classes and tuple(map(str, classes)))
    return _files(reader, samples, said)


def _create(name: str, split: str, root: str, said: str) -> Any:
    from timm.data import create_dataset

    try:
        return create_dataset(name, root=root, split="train" if split == "train" else "validation", download=False)
    except Exception as error:
        # timm and torchvision raise RuntimeError, AssertionError and others for what is not there.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{said}: cannot be opened in {root} ({reason}); nothing is downloaded here") from error


def _samples(reader: Any) -> Sequence[tuple[Any, int]] | None:
    """(path, label) of a data set of files; None where it holds its images itself."""
    if hasattr(reader, "index") and hasattr(reader, "all_categories"):
        # INaturalist has them in the order of the directory.
        places = sorted((reader.all_categories[label], name, label) for label, name in reader.index)
        return [(os.path.join(reader.root, folder, name), label) for folder, name, label in places]  # noqa: PTH118
    found: Sequence[tuple[Any, int]] | None = getattr(reader, "samples", getattr(reader, "imgs", None))
    return found


def _files(reader: Any, samples: Any, said: str) -> ImageFolder:
    """A data set of image files as one of ours, in timm's order."""
    if not all(isinstance(sample[0], str) for sample in samples):
        raise UsageError(f"{said}: reads a tar; give wds:PATTERN")
    root = os.path.abspath(reader.root)  # noqa: PTH100
    paths = [os.path.relpath(path, root) for path, *_ in samples]
    labels = from_numbers([target for _, target, *_ in samples], said)
    ids = getattr(reader, "wnid_to_idx", None) or getattr(reader, "class_to_idx", None)
    names = getattr(reader, "all_categories", None) or (sorted(ids, key=ids.__getitem__) if ids else [])
    return ImageFolder(Path(root), Keys.of(paths), labels, tuple(names) or None)


def _targets(dataset: Any, said: str) -> NDArray[np.int64] | None:
    targets = getattr(dataset, "targets", None)
    if targets is None:
        return None
    array = np.asarray(targets)
    # QMNIST has the class first, and then where the digit came from.
    return from_numbers(array[:, 0] if array.ndim == 2 else array, said)
