"""The codec `exact`: float16 log-probabilities in plain contiguous datasets that can be memory-mapped.

sample_id   uint32 | uint64   [n]       by place in the dealing
class_id    uint16 | uint32   [n, k]    most probable first; uint32 from 65,536 classes on
log_prob    float16           [n, k]
log_tail    float32           [n]       -inf where nothing remains
probe_crc   uint32            [p]       CRC-32 of the first rows' inputs
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import DamagedError
from distill_cli.store.plan import FORMAT, VERSION, Plan

ADVICE = "delete it and run teacher-logits again"


@dataclass(frozen=True)
class Rows:
    """Rows of one view: what a shard holds, and what a reader gives back."""

    sample_id: NDArray[Any]
    """`[n]`."""
    class_id: NDArray[Any]
    """`[n, k]`."""
    log_prob: NDArray[Any]
    """`[n, k]`."""
    log_tail: NDArray[Any]
    """`[n]`."""

    def __len__(self) -> int:
        return len(self.sample_id)


@dataclass(frozen=True)
class Shard:
    """An open shard: its rows and its probes are views of the file's memory map."""

    rows: Rows
    probe_crc: NDArray[np.uint32]


def dtypes(plan: Plan) -> dict[str, np.dtype[Any]]:
    """The little-endian type of each dataset."""
    return {
        "sample_id": np.dtype("<u4" if plan.samples <= 2**32 else "<u8"),
        "class_id": np.dtype("<u2" if plan.num_classes <= 2**16 - 1 else "<u4"),
        "log_prob": np.dtype("<f2"),
        "log_tail": np.dtype("<f4"),
        "probe_crc": np.dtype("<u4"),
    }


def encode(plan: Plan, view: int, shard: int, rows: Rows, probe_crc: NDArray[np.uint32]) -> bytes:
    """The bytes of one shard file; equal rows give equal bytes."""
    arrays = {
        "sample_id": rows.sample_id,
        "class_id": rows.class_id,
        "log_prob": rows.log_prob,
        "log_tail": rows.log_tail,
        "probe_crc": probe_crc,
    }
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        for name, value in _attributes(plan, view, shard).items():
            # Text of fixed length: over a damaged heap of variable-length strings HDF5 loops without end.
            file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value
        for name, dtype in dtypes(plan).items():
            file.create_dataset(name, data=np.ascontiguousarray(arrays[name], dtype=dtype))
    return buffer.getvalue()


def open_shard(path: Path, plan: Plan, view: int, shard: int) -> Shard:
    """Open one shard by memory map; HDF5 is asked only where the datasets lie, and closed again.

    Raises:
        DamagedError: the file is missing, cut short, of other shapes, or belongs to another store or place.
    """
    expected = _attributes(plan, view, shard)
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = {name: _attribute(file, name) for name in expected}
            layout = {name: _extent(file, name) for name in dtypes(plan)}
    except FileNotFoundError:
        raise DamagedError(f'{path}: missing; run the same "distill teacher-logits" command again') from None
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DamagedError(f"{path}: not a readable shard ({reason}); {ADVICE}") from error
    for name, value in expected.items():
        if found[name] != value:
            raise DamagedError(
                f"{path}: {name} is {found[name]}, not {value}: a shard of another store or place; {ADVICE}"
            )
    arrays = _map(path, plan, layout)
    rows = Rows(*(arrays[name] for name in ("sample_id", "class_id", "log_prob", "log_tail")))
    return Shard(rows, arrays["probe_crc"])


@dataclass(frozen=True)
class _Extent:
    """Where a contiguous dataset lies in its file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.dtype.itemsize * math.prod(self.shape)


def _map(path: Path, plan: Plan, layout: dict[str, _Extent]) -> dict[str, NDArray[Any]]:
    memory = np.memmap(path, np.uint8, "r")
    count, probes = (math.prod(layout[name].shape[:1]) for name in ("sample_id", "probe_crc"))
    table = (count, plan.top_k)
    shapes = {"sample_id": (count,), "class_id": table, "log_prob": table, "log_tail": (count,), "probe_crc": (probes,)}
    arrays = {}
    for name, dtype in dtypes(plan).items():
        extent = layout[name]
        if extent.dtype != dtype or extent.shape != shapes[name] or extent.end > len(memory):
            raise DamagedError(
                f"{path}: {name} is {extent.dtype} {list(extent.shape)} at byte {extent.offset}, "
                f"which the plan does not allow; {ADVICE}"
            )
        arrays[name] = np.asarray(memory[extent.offset : extent.end]).view(dtype).reshape(extent.shape)
    return arrays


def _extent(file: h5py.File, name: str) -> _Extent:
    """
    Raises:
        ValueError: the name leads out of this file, or to something else than a contiguous dataset.
    """
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is missing, or a link")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or dataset.external or dataset.is_virtual:
        raise ValueError(f"{name} is not a dataset of its own")
    offset = dataset.id.get_offset()
    if offset is None and dataset.size:
        raise ValueError(f"{name} is not contiguous")
    return _Extent(dataset.shape, dataset.dtype, offset or 0)


def _attributes(plan: Plan, view: int, shard: int) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "plan_sha256": plan.sha256, "view": view, "shard": shard}


def _attribute(file: h5py.File, name: str) -> str | int | None:
    """A number or a text of fixed length; None where there is neither."""
    if name not in file.attrs:
        return None
    attribute = file.attrs.get_id(name)
    if attribute.shape != () or attribute.dtype.kind not in "iuS":
        return None
    value: int | bytes = file.attrs[name].item()
    return value.decode(errors="replace") if isinstance(value, bytes) else value
