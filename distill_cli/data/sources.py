"""What a source of images is: sample id -> image and label, the id being the sample's place in a sorted listing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill_cli.data.images import Encoded, UnreadableImage
from distill_cli.data.keys import keys_sha256
from distill_cli.errors import MismatchError
from distill_cli.files import sha256

__all__ = ["Source", "UnreadableImage", "check_classes", "fingerprint", "num_classes", "parts", "without_labels"]


class Source(Protocol):
    """What every kind of data is to the rest of the program. Pickles, so that spawned loader workers can have it."""

    @property
    def keys(self) -> Sequence[str]:
        """Per sample its name: relative path, or index."""
        ...

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Per sample its class id, or None where the data has no labels."""
        ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The ordered class names, where the data has them."""
        ...

    def __len__(self) -> int: ...

    def content(self, sample_id: int) -> bytes:
        """What an image is decoded from: its file, or the bytes of its pixels.

        Raises:
            UnreadableImage: it cannot be read.
        """
        ...

    def encoded(self, sample_id: int, content: bytes) -> Encoded | None:
        """The image of some content, to be decoded later; None where the content is pixels."""
        ...

    def decode(self, sample_id: int, content: bytes) -> Image.Image:
        """The image of some content as RGB.

        Raises:
            UnreadableImage: it is no image.
        """
        ...

    def read(self, sample_id: int) -> Image.Image:
        """One image as RGB: its content, decoded.

        Raises:
            UnreadableImage: it cannot be read or is no image.
        """
        ...

    def read_with_crc(self, sample_id: int) -> tuple[Image.Image, int]:
        """One image as RGB, and the CRC-32 of its content.

        Raises:
            UnreadableImage: as `read`.
        """
        ...


def parts(source: Source) -> tuple[int, ...] | None:
    """Samples of each tar, where a source is tars one behind the other; None where any order of reading is as good."""
    return getattr(source, "parts", None)


def without_labels(source: Source) -> Source:
    """The same images with their labels and classes left out."""
    return replace(source, labels=None, classes=None)  # type: ignore[type-var]


def fingerprint(source: Source) -> dict[str, str | None]:
    """`keys_sha256` and `labels_sha256` (None without labels) of the listing: the same wherever the folder stands.

    It covers names, not pixels; the checksums of a store's first inputs cover those.
    """
    labels = None if source.labels is None else sha256(source.labels.astype("<i8").tobytes())
    return {"keys_sha256": keys_sha256(source.keys), "labels_sha256": labels}


def check_classes(source: Source, what: str, num_classes: int, classes: tuple[str, ...] | None) -> None:
    """Refuse labelled data whose classes are not those of a teacher, a store or a model.

    Raises:
        MismatchError: the counts differ, or the names in their order do; both are given.
    """
    advice = "give the data of these classes, or --set data.labelled=false to leave the labels out"
    if source.classes is not None and len(source.classes) != num_classes:
        raise MismatchError(f"{what}: has {num_classes} classes, the data {len(source.classes)}; {advice}")
    if source.labels is not None and source.labels.max() >= num_classes:
        raise MismatchError(f"{what}: has {num_classes} classes, the data has label {source.labels.max()}; {advice}")
    for place, (ours, theirs) in enumerate(zip(classes or (), source.classes or (), strict=False)):
        if ours != theirs:
            raise MismatchError(f'{what}: class {place} is "{ours}", that of the data "{theirs}"; {advice}')


def num_classes(source: Source) -> int | None:
    """The number of classes of labelled data, or None."""
    if source.classes is not None:
        return len(source.classes)
    return None if source.labels is None else int(source.labels.max()) + 1
