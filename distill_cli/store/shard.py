"""A shard: an HDF5 file whose first 1,024 bytes, which HDF5 leaves to its users, say in one line of JSON where the
arrays lie. Any tool opens the file as HDF5; this package reads the line and maps the file, so that a damaged or
hostile file never meets the HDF5 library, and nothing is held open that a fork could not share.

sample_id   uint32 | uint64   [n]   codec `exact` only
skipped     uint32            [s]   places of the shard, from 0, that have no row
probe_crc   uint32            [p]   CRC-32 of the first rows' inputs

and the arrays of the codec. Rows of a plan's first view have one more, imported ones two (store/tinyvit.py), which
readers may leave alone:

content_crc uint32            [n]      CRC-32 of what each row's image was decoded from
seed        int32             [n]      by which the rows' inputs were drawn
correction  int8              [n, k]   codec `exact` only: what makes `log_prob` the very bits of the probabilities
"""

import io
import itertools
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import DamagedError
from distill_cli.files import canonical_json, sha256
from distill_cli.store.codecs import CODECS
from distill_cli.store.place import ADVICE
from distill_cli.store.plan import FORMAT, PROBES, VERSION, Plan, is_count, parse
from distill_cli.store.rows import Rows

HEADER_BYTES = 1024
ALIGNMENT = 8
DTYPES = {name: np.dtype(name) for name in ("<u2", "<u4", "<u8", "<i4", "<f2", "<f4", "|u1", "|i1")}
"""What an array of a shard can be."""
CONTENT_CRC = "content_crc"
EXTRAS = {CONTENT_CRC: ("<u4", 1), "seed": ("<i4", 1), "correction": ("|i1", 2)}
"""Arrays that rows can have besides the codec's: type and dimensions, the first of which is the rows'."""
Array = tuple[str, tuple[int, ...], int]
"""Type, shape and first byte."""


@dataclass(frozen=True)
class Header:
    """The first line of a shard."""

    plan_sha256: str
    view: int
    """By which the rows' inputs were drawn."""
    shard: int
    rows: int
    top1: int | None
    """Rows whose label is the first class; None without labels."""
    top5: int | None
    payload_sha256: str
    """Of all bytes behind the header."""
    arrays: Mapping[str, Array]
    format: str = FORMAT
    version: int = VERSION


@dataclass(frozen=True)
class Shard:
    """An open shard: its arrays are views of a memory map."""

    header: Header
    rows: Any
    """As the codec opened them."""
    skipped: NDArray[np.uint32]
    probe_crc: NDArray[np.uint32]
    sample_id: NDArray[Any] | None
    size: int
    """Bytes of the file."""
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Those of `EXTRAS` that the rows have."""

    def __len__(self) -> int:
        return self.header.rows

    def find(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of some places of this shard.

        Raises:
            KeyError: a place has no row.
        """
        if len(self.skipped) == 0:
            return places
        before = np.searchsorted(self.skipped, places)
        if (self.skipped[np.minimum(before, len(self.skipped) - 1)] == places).any():
            raise KeyError(places)
        return places - before


def encode(
    plan: Plan,
    view: int,
    shard: int,
    rows: Rows,
    probe_crc: NDArray[np.uint32],
    hits: tuple[int | None, int | None] = (None, None),
    extra: Mapping[str, NDArray[Any]] | None = None,
) -> bytes:
    """The bytes of one shard file; equal rows give equal bytes.

    Args:
        view: from 0 within the plan.
        rows: by place.
        hits: rows whose label is the first class, and among the first five.
        extra: arrays of `EXTRAS`, by row.
    """
    wanted = plan.dealing.sample_ids(shard)
    kept = np.isin(wanted, rows.sample_id)
    assert np.array_equal(wanted[kept], rows.sample_id), "rows are not by place"
    arrays = {
        **({"sample_id": rows.sample_id.astype(_id_dtype(plan))} if plan.codec == "exact" else {}),
        **CODECS[plan.codec].encode(rows, plan.form),
        "skipped": np.flatnonzero(~kept).astype("<u4"),
        "probe_crc": probe_crc.astype("<u4"),
        **{name: array.astype(EXTRAS[name][0]) for name, array in (extra or {}).items()},
    }
    named: dict[str, str | int] = {"plan_sha256": plan.sha256, "view": plan.first_view + view, "shard": shard}
    content, where = _hdf5({"format": FORMAT, "version": VERSION, **named}, arrays)
    digest = sha256(bytes(content[HEADER_BYTES:]))
    header = Header(**named, rows=len(rows), top1=hits[0], top5=hits[1], payload_sha256=digest, arrays=where)  # type: ignore[arg-type]
    line = canonical_json({item.name: getattr(header, item.name) for item in fields(Header)}).encode()
    assert len(line) < HEADER_BYTES, line
    content[:HEADER_BYTES] = line.ljust(HEADER_BYTES - 1) + b"\n"
    return bytes(content)


def read_header(path: Path, content: bytes) -> Header:
    """The header in a shard's first bytes.

    Raises:
        DamagedError: it is none.
        MismatchError: it is of another version of the format.
    """
    if len(content) < HEADER_BYTES:
        raise DamagedError(f"{path}: not a shard ({len(content)} bytes); {ADVICE}")
    try:
        values = parse(content[:HEADER_BYTES], str(path))
        arrays = {name: _array(*layout) for name, layout in values.pop("arrays").items()}
        header = Header(**values, arrays=arrays)
        if not is_count(header.rows) or not isinstance(header.payload_sha256, str):
            raise ValueError(f"rows is {header.rows!r}")
        if not all(hits is None or is_count(hits, 0, header.rows) for hits in (header.top1, header.top5)):
            raise ValueError(f"top1 and top5 are {header.top1!r}, {header.top5!r}")
    except (DamagedError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path}: its first line is not a shard's; {ADVICE}") from error
    return header


def open_shard(path: Path, plan: Plan, view: int, shard: int) -> Shard:
    """Open one shard by memory map.

    Args:
        view: from 0 within the plan.

    Raises:
        DamagedError: the file is missing, cut short, of other shapes, or belongs to another store or place.
    """
    memory = _map(path)
    header = read_header(path, memory[:HEADER_BYTES])
    expected = {"plan_sha256": plan.sha256, "view": plan.first_view + view, "shard": shard}
    for name, value in expected.items():
        if (found := getattr(header, name)) != value or type(found) is not type(value):
            where = f"{path}: {name} is {found!r}, not {value!r}"
            raise DamagedError(f"{where}: a shard of another store or place; {ADVICE}")
    try:
        _check_apart(header.arrays)
        arrays = {name: _view(memory, name, layout) for name, layout in header.arrays.items()}
        opened = _open(arrays, header, plan, shard, len(memory))
    except ValueError as error:
        raise DamagedError(f"{path}: {error}, which the plan does not allow; {ADVICE}") from error
    return opened


def check_rows(path: Path, opened: Shard, plan: Plan, shard: int) -> None:
    """Look at every row of an open shard once.

    Raises:
        DamagedError: a value is none that a row can have.
    """
    try:
        CODECS[plan.codec].check(opened.rows, plan.form)
        if opened.sample_id is not None:
            places = np.delete(np.arange(len(plan.dealing.places(shard))), opened.skipped)
            if not np.array_equal(opened.sample_id, plan.dealing.sample_ids(shard)[places]):
                raise ValueError("sample_id has other samples")
    except ValueError as error:
        raise DamagedError(f"{path}: {error}, which the plan does not allow; {ADVICE}") from error


def _open(arrays: Mapping[str, NDArray[Any]], header: Header, plan: Plan, shard: int, size: int) -> Shard:
    """
    Raises:
        ValueError: the arrays are not those of this shard.
    """
    n, places = header.rows, len(plan.dealing.places(shard))
    if n > places:
        raise ValueError(f"rows is {n} of {places}")
    skipped = arrays.get("skipped", np.zeros(0, "<u4"))
    if skipped.dtype != "<u4" or skipped.shape != (places - n,):
        raise ValueError(f"skipped is {skipped.dtype} {list(skipped.shape)} for {n} rows of {places}")
    if len(skipped) and not ((np.diff(skipped.astype(np.int64)) > 0).all() and skipped[-1] < places):
        raise ValueError("skipped is not a list of places")
    probes = arrays.get("probe_crc", np.zeros(0, "<u4"))
    if probes.dtype != "<u4" or probes.shape not in ((0,), (min(PROBES, n),)):
        raise ValueError(f"probe_crc is {probes.dtype} {list(probes.shape)}")
    sample_id = arrays.get("sample_id")
    if plan.codec == "exact" and (sample_id is None or sample_id.dtype != _id_dtype(plan) or sample_id.shape != (n,)):
        raise ValueError("sample_id is not one number a row")
    extra = {name: arrays[name] for name in EXTRAS if name in arrays}
    for name, array in extra.items():
        dtype, dimensions = EXTRAS[name]
        if array.dtype != dtype or array.ndim != dimensions or len(array) != n:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)} for {n} rows")
    rows = CODECS[plan.codec].open(arrays, n, plan.form)
    return Shard(header, rows, skipped, probes, sample_id, size, extra)


def _array(dtype: str, shape: list[int], first: int) -> Array:
    """
    Raises:
        ValueError, TypeError, KeyError: it says of no array where it lies.
    """
    if not (isinstance(shape, list) and 1 <= len(shape) <= 2 and all(is_count(size) for size in shape)):
        raise ValueError(f"shape {shape!r}")
    if dtype not in DTYPES or not is_count(first, HEADER_BYTES):
        raise ValueError(f"{dtype!r} at {first!r}")
    return dtype, tuple(shape), first


def _check_apart(arrays: Mapping[str, Array]) -> None:
    """
    Raises:
        ValueError: two arrays share bytes.
    """
    spans = [(first, first + math.prod(shape) * DTYPES[dtype].itemsize) for dtype, shape, first in arrays.values()]
    if any(start < end for (_, end), (start, _) in itertools.pairwise(sorted(spans))):
        raise ValueError("its arrays overlap")


def _view(memory: mmap.mmap, name: str, layout: Array) -> NDArray[Any]:
    """
    Raises:
        ValueError: the array does not lie in the file.
    """
    dtype, shape, first = layout
    count = math.prod(shape)
    if count == 0:
        return np.zeros(shape, DTYPES[dtype])
    if first % ALIGNMENT or first + count * DTYPES[dtype].itemsize > len(memory):
        raise ValueError(f"{name} is {dtype} {list(shape)} at byte {first} of {len(memory)}")
    return np.frombuffer(memory, DTYPES[dtype], count, first).reshape(shape)


def _map(path: Path) -> mmap.mmap:
    """
    Raises:
        DamagedError: there is no file, or nothing in it.
    """
    try:
        # Neither a pipe nor a device in a shard's place may keep the reader waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DamagedError(f'{path}: missing; run the same "distill teacher-logits" command again') from None
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except (ValueError, OSError) as error:
        raise DamagedError(f"{path}: not a readable shard ({error}); {ADVICE}") from error
    finally:
        os.close(descriptor)


def _hdf5(
    attributes: Mapping[str, str | int], arrays: Mapping[str, NDArray[Any]]
) -> tuple[bytearray, dict[str, Array]]:
    """An HDF5 file of contiguous arrays with room for the header, and where the arrays lie in it."""
    buffer, where = io.BytesIO(), {}
    layout = {"libver": ("v110", "v110"), "alignment_threshold": 1, "alignment_interval": ALIGNMENT}
    with h5py.File(buffer, "w", userblock_size=HEADER_BYTES, **layout) as file:
        for name, value in attributes.items():
            # Text of fixed length: over a damaged heap of variable-length strings HDF5 loops without end.
            file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value
        for name, array in arrays.items():
            dataset = file.create_dataset(name, data=np.ascontiguousarray(array))
            first = dataset.id.get_offset() if array.size else HEADER_BYTES
            where[name] = (array.dtype.str, array.shape, first)
    return bytearray(buffer.getbuffer()), where


def _id_dtype(plan: Plan) -> np.dtype[Any]:
    return np.dtype("<u4" if plan.samples <= 2**32 else "<u8")
