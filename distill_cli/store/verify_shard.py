"""Whether one shard is what it was written as: its bytes, its first line, its rows, and what HDF5 makes of it."""

import hashlib
import os
import stat
import threading
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.files import canonical_json
from distill_cli.report import Progress
from distill_cli.store.codecs import CODECS
from distill_cli.store.hdf5_view import check_hdf5
from distill_cli.store.inventory import Piece
from distill_cli.store.manifest import ADVICE as MANIFEST_ADVICE
from distill_cli.store.manifest import ShardEntry
from distill_cli.store.plan import Generation, Plan
from distill_cli.store.shard import ADVICE, HEADER_BYTES, Header, Shard, check_rows, open_shard, read_header
from distill_cli.store.writer import Finished, finished

CHUNK = 4 * 2**20
DECODED_ROWS = 8192


@dataclass(frozen=True)
class Looked:
    """What one shard turned out to be."""

    said: Finished | None
    """None where it is not sound."""
    found: str = ""
    plan_sha256: str | None = None
    """That its first line names, where it can be read."""


class Meter:
    """Counts bytes of several threads, and says them in MB."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.bytes, self._said = progress, 0, 0
        self._alone = threading.Lock()

    def advance(self, count: int) -> None:
        with self._alone:
            self.bytes += count
            self._say(self.bytes // 10**6)

    def finish(self, total: int) -> None:
        """What is left of the last MB."""
        self._say(-(-total // 10**6))

    def _say(self, megabytes: int) -> None:
        if megabytes > self._said:
            self.progress.advance(megabytes - self._said)
            self._said = megabytes


def look_at_shard(
    folder: Path, generation: Generation, piece: Piece, entry: ShardEntry | None, meter: "Meter"
) -> Looked:
    """Verify one shard: its bytes, then its first line, then its rows, then what HDF5 makes of it."""
    path, plan = folder / generation.path(*piece), generation.plan
    named = None
    try:
        head, whole, payload, size = _digests(path, meter)
        try:
            header = read_header(path, head)
            named = header.plan_sha256
        except (DamagedError, MismatchError):
            header = None
        if entry is not None and size != entry.bytes:
            raise ValueError(f"has {size:,} bytes, by the manifest {entry.bytes:,}")
        if entry is not None and whole != entry.sha256:
            raise ValueError("its sha256 is not the manifest's")
        header = header or read_header(path, head)
        if _line(header) != head:
            raise ValueError("its first line is not as it was written")
        if payload != header.payload_sha256:
            raise ValueError("its bytes are not those that were written")
        opened = open_shard(path, plan, *piece)
        if entry is not None and entry.rows != len(opened):
            raise ValueError(f"has {len(opened):,} rows, by the manifest {entry.rows:,}")
        check_rows(path, opened, plan, piece[1])
        _decode(opened, plan)
        check_hdf5(path, header)
    except (ValueError, DamagedError, MismatchError) as error:
        return Looked(None, bare(error, path), named)
    mine = ShardEntry(generation.path(*piece), len(opened), size, whole)
    return Looked(finished(plan, piece[1], opened, mine), plan_sha256=named)


def _digests(path: Path, meter: "Meter") -> tuple[bytes, str, str, int]:
    """The first line of a shard file, the sha256 of all and of what follows the line, and the size.

    Raises:
        ValueError: it is a link, or no regular file.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("is a link, which is not followed" if path.is_symlink() else "is no regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    whole, payload, size = hashlib.sha256(), hashlib.sha256(), 0
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        head = file.read(HEADER_BYTES)
        whole.update(head)
        size += len(head)
        buffer = memoryview(bytearray(CHUNK))
        while count := file.readinto(buffer):
            whole.update(buffer[:count])
            payload.update(buffer[:count])
            size += count
            meter.advance(count)
    meter.advance(len(head))
    return head, whole.hexdigest(), payload.hexdigest(), size


def _line(header: Header) -> bytes:
    """The bytes of a header, as a writer makes them."""
    line = canonical_json({item.name: getattr(header, item.name) for item in fields(Header)}).encode()
    return line.ljust(HEADER_BYTES - 1) + b"\n"


def _decode(opened: Shard, plan: Plan) -> None:
    """Decode every row.

    Raises:
        ValueError: a row does not decode, or has a class twice, or one that there is not, or no log-probability.
    """
    for start in range(0, len(opened), DECODED_ROWS):
        at = np.arange(start, min(start + DECODED_ROWS, len(opened)))
        class_id, log_prob, log_tail, count = CODECS[plan.codec].take([(opened.rows, at)], plan.form)
        if class_id.size and class_id.max() >= plan.num_classes:
            raise ValueError(f"has class {class_id.max()} of {plan.num_classes}")
        # Padding is -inf. NaN is not at most 0 either.
        if not (log_prob <= np.float16(0.001)).all() or not (log_tail <= np.float32(0.001)).all():
            raise ValueError("has values that are no log-probabilities")
        classes = class_id.astype(np.int32)
        if count is not None:
            # As classes that there are not, each once.
            entries = np.arange(classes.shape[1], dtype=np.int32)
            classes = np.where(entries < count[:, None], classes, -1 - entries)
        classes.sort(axis=1)
        if (classes[:, 1:] == classes[:, :-1]).any():
            raise ValueError("has a row with a class twice")


def bare(error: Exception, path: Path) -> str:
    """A message without the file's name, and without the advice to do what is done here."""
    text = str(error).removeprefix(f"{path}: ").removesuffix(f"; {ADVICE}").removesuffix(f"; {MANIFEST_ADVICE}")
    return text.removesuffix(f", which the plan does not allow; {ADVICE}")
