"""TinyViT's files of saved logits: their reader and writer, and what their records are as rows of a store.

DIR/logits_top{K}_epoch{E}/    one folder an epoch
    rank{r}-keys.txt           a line for each record: the sample's index, or the stem of its image file
    rank{r}-values.bin         records of 4 + 4K bytes, little-endian, without header or padding:

    seed       int32           of the augmentation
    class_id   int16    [K]    most probable first; above 32,767 it has wrapped, and is read as uint16
    prob       float16  [K]    softmax at temperature 1

Nothing says which teacher, how many classes, or whether a file is complete. The mass of the other classes is what is
missing of 1, which rounding can make negative.

Source: microsoft/Cream, TinyViT/data/augmentation/manager.py, TinyViT/save_logits.py.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import DamagedError, MismatchError, UsageError
from distill_cli.store.rows import Rows

EPOCH = re.compile(r"logits_top([1-9]\d*)_epoch(\d+)")
RANK = re.compile(r"rank(\d+)-(keys\.txt|values\.bin)")
ADVICE = "copy it again, or save this epoch again"
_CHUNK = 2**22


def record_dtype(k: int) -> np.dtype[Any]:
    """One record of k classes; class ids as the uint16 that they were before they wrapped."""
    return np.dtype([("seed", "<i4"), ("class_id", "<u2", (k,)), ("prob", "<f2", (k,))])


@dataclass(frozen=True)
class RankFile:
    """The records that one rank saved of one epoch. Mirror of `RankWriter`."""

    folder: Path
    rank: int
    k: int

    @property
    def keys_path(self) -> Path:
        return self.folder / f"rank{self.rank}-keys.txt"

    @property
    def values_path(self) -> Path:
        return self.folder / f"rank{self.rank}-values.bin"

    def keys(self) -> bytes:
        """The keys, each with a newline."""
        return self.keys_path.read_bytes()

    @cached_property
    def records(self) -> NDArray[Any]:
        """All records `[n]`, as views of a memory map; `RankFile.sha256` has found them whole."""
        if self.values_path.stat().st_size == 0:
            return np.zeros(0, record_dtype(self.k))
        return np.memmap(self.values_path, record_dtype(self.k), mode="r")

    def sha256(self) -> tuple[str, str]:
        """Of the keys and of the values, each file read once.

        Raises:
            DamagedError: a file is missing or cut short; what was found and what was expected.
        """
        for path in (self.keys_path, self.values_path):
            if not path.is_file():
                raise DamagedError(f"{path}: missing, the other file of the pair is there; {ADVICE}")
        keys, lines, end = _read_through(self.keys_path)
        values, _, _ = _read_through(self.values_path)
        size, record = self.values_path.stat().st_size, record_dtype(self.k).itemsize
        if end not in (b"", b"\n"):
            raise DamagedError(f"{self.keys_path}: ends within a line, after {lines} whole keys; {ADVICE}")
        if size != lines * record:
            more = f" and {size % record} bytes" if size % record else ""
            raise DamagedError(
                f"{self.values_path}: {size // record} records{more} of {record} bytes, "
                f"{self.keys_path.name} has {lines} keys; {ADVICE}"
            )
        return keys, values


class RecordReader:
    """One record at a time by seek and read, as TinyViT's own loader does; for comparison with `RankFile.records`."""

    def __init__(self, path: Path, k: int) -> None:
        self.k, self.size = k, record_dtype(k).itemsize
        self._file: IO[bytes] = path.open("rb")

    def read(self, number: int) -> tuple[int, NDArray[np.uint16], NDArray[np.float16]]:
        """Seed, class ids and probabilities of one record."""
        self._file.seek(number * self.size)
        content = self._file.read(self.size)
        seed = int.from_bytes(content[:4], "little", signed=True)
        ids = np.frombuffer(content, "<u2", self.k, 4)
        return seed, ids, np.frombuffer(content, "<f2", self.k, 4 + 2 * self.k)

    def close(self) -> None:
        self._file.close()


class RankWriter:
    """Writes the files of one rank: any records in any order, then the keys. Mirror of `RankFile`."""

    def __init__(self, folder: Path, rank: int, k: int, n: int) -> None:
        """
        Raises:
            OSError: there is no room for n records.
        """
        self.file = RankFile(folder, rank, k)
        dtype = record_dtype(k)
        with self.file.values_path.open("wb") as file:
            _allocate(file, n * dtype.itemsize)
        path = self.file.values_path
        self.records: NDArray[Any] = np.memmap(path, dtype, mode="r+") if n else np.zeros(0, dtype)
        """`[n]`, to be written to."""

    def __enter__(self) -> "RankWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None and isinstance(self.records, np.memmap):
            self.records.flush()
            with self.file.values_path.open("rb") as file:
                os.fsync(file.fileno())
        del self.records

    def write_keys(self, keys: Iterable[str]) -> None:
        """The keys, in the order of the records."""
        with self.file.keys_path.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.writelines(f"{key}\n" for key in keys)
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Epoch:
    """One folder of saved logits."""

    folder: Path
    number: int
    k: int
    ranks: tuple[RankFile, ...]


def epochs(folder: Path) -> list[Epoch]:
    """The epochs of a folder, ascending.

    Raises:
        UsageError: there are none.
        MismatchError: they have different numbers of classes.
        DamagedError: an epoch has no files.
    """
    names = [(EPOCH.fullmatch(path.name), path) for path in sorted(folder.glob("logits_top*_epoch*"))]
    found = [_epoch(path, int(name[2]), int(name[1])) for name, path in names if name is not None and path.is_dir()]
    if not found:
        raise UsageError(f"{folder}: has no folders logits_top{{K}}_epoch{{E}}; give the one that TinyViT saved to")
    found.sort(key=lambda epoch: epoch.number)
    for epoch in found:
        if epoch.k != found[0].k:
            raise MismatchError(
                f"{folder}: has logits of {found[0].k} classes and of {epoch.k} ({found[0].folder.name}, "
                f"{epoch.folder.name}); keep those of one number there"
            )
    return found


def _epoch(folder: Path, number: int, k: int) -> Epoch:
    matches = [RANK.fullmatch(path.name) for path in folder.iterdir()]
    ranks = sorted({int(match[1]) for match in matches if match is not None})
    if not ranks:
        raise DamagedError(f"{folder}: has no files rank{{r}}-keys.txt and rank{{r}}-values.bin; {ADVICE}")
    return Epoch(folder, number, k, tuple(RankFile(folder, rank, k) for rank in ranks))


def wrong_record(records: NDArray[Any], num_classes: int) -> tuple[int, str] | None:
    """The first record that no teacher of `num_classes` can have given, and what is wrong with it."""
    class_id, prob = records["class_id"], records["prob"].astype(np.float32)
    in_order = np.sort(class_id, axis=1)
    checks = {
        f"has a class above {num_classes - 1}": (class_id >= num_classes).any(axis=1),
        "has a class twice": (in_order[:, 1:] == in_order[:, :-1]).any(axis=1),
        # NaN is in no range.
        "has values that are no probabilities": ~((prob >= 0) & (prob <= 1)).all(axis=1),
    }
    for reason, wrong in checks.items():
        if wrong.any():
            return int(wrong.argmax()), reason
    return None


def to_rows(
    records: NDArray[Any], sample_id: NDArray[np.int64], num_classes: int
) -> tuple[Rows, NDArray[np.int8], int]:
    """Rows of a store, what `to_records` needs to give the very records back, and how many tails were negative.

        log_prob = log p,    log_tail = log max(0, 1 - sum p)

    Args:
        records: `[n]`, each with classes and values that `wrong_record` has nothing against.
    """
    class_id, prob = records["class_id"], records["prob"]
    if (prob[:, 1:] > prob[:, :-1]).any():
        order = np.argsort(-prob, axis=1, kind="stable")
        class_id, prob = np.take_along_axis(class_id, order, 1), np.take_along_axis(prob, order, 1)
    exact = prob.astype(np.float64)
    rest = 1 - exact.sum(axis=1)
    if class_id.shape[1] == num_classes:
        rest[:] = 0
    with np.errstate(divide="ignore"):
        log_prob, log_tail = np.log(exact), np.log(np.maximum(rest, 0))
    correction = _bits(prob) - _bits(_probability(log_prob.astype("<f2")))
    return Rows(sample_id, class_id, log_prob, log_tail), correction.astype(np.int8), int((rest < 0).sum())


def to_records(rows: Rows, seed: NDArray[np.int32], correction: NDArray[np.int8] | None = None) -> NDArray[Any]:
    """The records of some rows that all have k classes.

    Args:
        correction: as `to_rows` gave it, with rows in float16; without it, values are float16(exp(log_prob)).
    """
    records = np.zeros(len(rows), record_dtype(rows.class_id.shape[1]))
    prob = _probability(rows.log_prob)
    if correction is not None:
        prob = (_bits(prob) + correction).astype("<u2").view("<f2")
    records["seed"], records["class_id"], records["prob"] = seed, rows.class_id, prob
    return records


def _probability(log_prob: NDArray[Any]) -> NDArray[np.float16]:
    return np.exp(log_prob.astype(np.float64)).astype("<f2")


def _bits(prob: NDArray[np.float16]) -> NDArray[np.int32]:
    """Of non-negative float16: neighbours are 1 apart."""
    return np.ascontiguousarray(prob).view("<u2").astype(np.int32)


def _read_through(path: Path) -> tuple[str, int, bytes]:
    """sha256, newlines and last byte of a file."""
    digest, lines, end = hashlib.sha256(), 0, b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            lines, end = lines + chunk.count(b"\n"), chunk[-1:]
    return digest.hexdigest(), lines, end


def _allocate(file: IO[bytes], size: int) -> None:
    """Room on the disk before the file is mapped: writing to a map cannot fail, only crash."""
    if not hasattr(os, "posix_fallocate"):
        for start in range(0, size, _CHUNK):
            file.write(bytes(min(_CHUNK, size - start)))
    elif size:
        os.posix_fallocate(file.fileno(), 0, size)
