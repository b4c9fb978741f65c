"""The index of one tar of samples: where each image's bytes lie, its key, and its label.

Members whose names agree up to the first dot of their last part are one sample, as WebDataset has it: `a/0001.jpg`,
`a/0001.cls`. The label is the text of `.cls`; else `.txt`, if it is an integer (it is a caption otherwise); else in
`.json` the value itself, or its field `label`, `class` or `cls`.
"""

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from distill_cli.data.images import EXTENSIONS, printable
from distill_cli.data.keys import Keys
from distill_cli.data.listing_cache import pack, unpack
from distill_cli.errors import UsageError

IMAGES = {extension.removeprefix(".") for extension in EXTENSIONS}
LABELS = ("cls", "txt", "json")
END = bytes(512)
LONGEST_LABEL = 1 << 20


@dataclass(frozen=True)
class TarIndex:
    """The samples of one tar, in its order."""

    keys: Keys
    offsets: NDArray[np.int64]
    """Of the first byte of each image in the tar."""
    sizes: NDArray[np.int64]
    labels: Keys | None
    """As text."""

    def __len__(self) -> int:
        return len(self.keys)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        labels = {} if self.labels is None else pack("labels", self.labels)
        return {**pack("keys", self.keys), **labels, "offsets": self.offsets, "sizes": self.sizes}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "TarIndex":
        """
        Raises:
            ValueError, KeyError: the arrays do not fit each other.
        """
        labels = unpack("labels", arrays) if "labels" in arrays else None
        offsets, sizes = (arrays[name].astype(np.int64) for name in ("offsets", "sizes"))
        index = cls(unpack("keys", arrays), offsets, sizes, labels)
        if {len(offsets), len(sizes), len(index) if labels is None else len(labels)} != {len(index)}:
            raise ValueError("arrays of different lengths")
        return index


def index_tar(path: Path, name: str, count: Callable[[int], None] = lambda images: None) -> TarIndex:
    """Read the headers of a tar from end to end.

    Args:
        name: what messages call it.

    Raises:
        UsageError: it cannot be read or is cut short; a member is no file, or its name leaves the tar; a key is there
            twice; some images have labels and others not; there are none.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, tuple[int, str]] = {}
    with path.open("rb") as file:
        _check_unpacked(file.read(6), name)
        for member in _members(file, name):
            key, kind = _split(member.name)
            if kind in IMAGES:
                if key in images:
                    raise UsageError(f"{name}: {printable(key)} has two images; give each a name of its own")
                images[key] = member.offset_data, member.size
                count(1)
            elif kind in LABELS:
                label = _label(os.pread(file.fileno(), min(member.size, LONGEST_LABEL), member.offset_data), kind)
                rank = LABELS.index(kind)
                if label is not None and rank <= labels.get(key, (rank, ""))[0]:
                    labels[key] = rank, label
    if not images:
        raise UsageError(f"{name}: no images ({' '.join(EXTENSIONS)}) in it")
    bare = next((key for key in images if key not in labels), None)
    if bare is not None and not labels.keys().isdisjoint(images):
        raise UsageError(f"{name}: {printable(bare)} has no label, others have; give one to every image, or to none")
    offsets, sizes = np.array(list(images.values()), np.int64).T.copy()
    return TarIndex(Keys.of(images), offsets, sizes, None if bare else Keys.of(labels[key][1] for key in images))


def _check_unpacked(start: bytes, name: str) -> None:
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
        raise UsageError(f"{name}: is compressed, so no image can be read by itself; unpack it to a plain .tar")


def _members(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, each checked.

    Raises:
        UsageError: as `index_tar`.
    """
    last = "its beginning"
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                # Else it keeps an object for every member.
                tar.members = []  # type: ignore[attr-defined]
                _check(member, name)
                last = printable(member.name)
                if not member.isdir() and not member.name.rpartition("/")[2].startswith("."):
                    yield member
            # It takes a header that is cut or damaged for the end.
            ended = os.pread(file.fileno(), len(END), tar.offset) == END
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name}: damaged or cut after {last} ({reason}); fetch it again") from error
    if not ended:
        raise UsageError(f"{name}: damaged or cut after {last} (byte {tar.offset}: no end mark); fetch it again")


def _check(member: tarfile.TarInfo, name: str) -> None:
    said = f"{name}: member {printable(member.name)}"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UsageError(f"{said} leaves the tar; write it without .. and from no root")
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise UsageError(f"{said} is no plain file; write links and devices as files, or leave them out")


def _split(name: str) -> tuple[str, str]:
    """Key, and what follows the first dot of the last part, in small letters."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    base, _, kind = last.partition(".")
    return f"{folder}{slash}{base}", kind.lower()


def _label(content: bytes, kind: str) -> str | None:
    text = content.decode(errors="surrogateescape").strip()
    if kind == "cls":
        return text or None
    if kind == "txt":
        return text if text.lstrip("+-").isdecimal() and text.isascii() else None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(value, dict):
        value = next((value[field] for field in ("label", "class", "cls") if field in value), None)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
