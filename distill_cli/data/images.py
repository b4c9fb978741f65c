"""Encoded images -> RGB, whatever they are; what is no image is one line that names it."""

import io
import os
import stat
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from distill_cli.errors import DistillError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LARGE_BYTES, MOST_BYTES = 2**24, 2**30
"""From the first on a file is looked at before it is read whole; beyond the second it is not read."""


class UnreadableImage(DistillError):
    """One image cannot be decoded; `--skip-unreadable` goes on without it."""


@dataclass(frozen=True)
class Encoded:
    """An encoded image, decoded once it is known how much of it is needed."""

    content: bytes
    name: object
    """Of the line about one that is no image."""

    @cached_property
    def header(self) -> Image.Image:
        """The image without its pixels: it has its size.

        Raises:
            UnreadableImage: it is no image.
        """
        with self._readable():
            return Image.open(io.BytesIO(self.content))

    def decoded(self, by: int = 1) -> Image.Image:
        """The first frame as RGB, as Pillow has it: EXIF rotation is not applied.

        Args:
            by: 1, 2, 4 or 8, at most the shorter side: libjpeg decodes a JPEG at this part of its sides, rounded up;
                any other image is whole.

        Raises:
            UnreadableImage: it is no image, is cut short or damaged, or has more pixels than Pillow takes for harmless.
        """
        with self._readable(), Image.open(io.BytesIO(self.content)) as image:
            if by > 1 and image.format == "JPEG":
                image.draft(image.mode, (image.width // by, image.height // by))
            return as_rgb(image)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                # Pillow warns of odd metadata, and of half the size that it refuses.
                warnings.simplefilter("ignore")
                yield
        except DistillError:
            raise
        except Exception as error:
            # Pillow's plugins let through whatever a damaged file makes them stumble over.
            raise unreadable(self.name, error) from error


class Readable:
    """An image is read by its content, and decoded from it: what every source does in two steps of its own.

    One whose images are encoded says `encoded`, one whose content is pixels says `decode`.
    """

    def content(self, sample_id: int) -> bytes:
        raise NotImplementedError

    def encoded(self, sample_id: int, content: bytes) -> Encoded | None:
        return None

    def decode(self, sample_id: int, content: bytes) -> Image.Image:
        encoded = self.encoded(sample_id, content)
        assert encoded is not None, "a source of pixels has a decode of its own"
        return encoded.decoded()

    def read(self, sample_id: int) -> Image.Image:
        return self.decode(sample_id, self.content(sample_id))

    def read_with_crc(self, sample_id: int) -> tuple[Image.Image, int]:
        content = self.content(sample_id)
        return self.decode(sample_id, content), zlib.crc32(content)


def read_file(path: Path) -> bytes:
    """The bytes of a file; a large one is looked at before it is read.

    Raises:
        UnreadableImage: it cannot be read, is no regular file, is larger than `MOST_BYTES`, or is large and no image.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                # Of a device there may be no end.
                raise OSError("it is no regular file")
            check_size(status.st_size, path)
            if status.st_size > LARGE_BYTES:
                _look_at(file, path)
            return file.read()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def check_size(size: int, name: object) -> None:
    """
    Raises:
        UnreadableImage: so many bytes are not read for an image.
    """
    if size > MOST_BYTES:
        raise unreadable(name, f"it has {size:,} bytes, more than {MOST_BYTES:,}")


def _look_at(file: IO[bytes], name: object) -> None:
    """
    Raises:
        UnreadableImage: it does not begin as an image does, or is one of too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(file)
    except Exception as error:
        raise unreadable(name, error) from error
    file.seek(0)


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB of any kind of image; Pillow itself clips 16 bits to 8, where the high byte is meant."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGB":
        # Without the copy that convert makes.
        image.load()
        return image
    return image.convert("RGB")


def unreadable(name: object, error: Exception | str) -> UnreadableImage:
    """The one line about an image that cannot be had."""
    if isinstance(error, UnidentifiedImageError):
        error = "it is empty or no image that Pillow knows"
    elif isinstance(error, OSError) and error.strerror:
        error = error.strerror.lower()
    reason = " ".join(str(error).replace(str(name), "the file").split()) or type(error).__name__
    return UnreadableImage(
        f"{printable(name)}: cannot be decoded ({reason}); replace it, or go on without it by --skip-unreadable"
    )


def printable(name: object) -> str:
    """A name as one line: newlines and what no terminal shows as escapes."""
    text = str(name)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _without_waiting(path: str, flags: int) -> int:
    # A pipe in a file's place would keep the loader waiting for ever.
    return os.open(path, flags | os.O_NONBLOCK)
