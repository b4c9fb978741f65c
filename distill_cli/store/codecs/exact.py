"""The codec `exact`: float16 log-probabilities in plain arrays that can be memory-mapped.

count       uint16            [n]       entries of each row; only where rows are ragged
class_id    uint16 | uint32   [n, k]    most probable first; uint32 from 65,536 classes on
log_prob    float16           [n, k]
log_tail    float32           [n]       -inf where nothing remains

Ragged rows lie one behind the other: `class_id` and `log_prob` are then [sum of count].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.store.rows import RowFormat, Rows, Taken


@dataclass(frozen=True)
class Opened:
    """The arrays of one shard: views of its memory map, but for the starts of ragged rows."""

    class_id: NDArray[Any]
    log_prob: NDArray[np.float16]
    log_tail: NDArray[np.float32]
    count: NDArray[np.int64] | None = None
    start: NDArray[np.int64] | None = None


def class_dtype(form: RowFormat) -> np.dtype[Any]:
    return np.dtype("<u2" if form.num_classes <= 2**16 - 1 else "<u4")


def encode(rows: Rows, form: RowFormat) -> dict[str, NDArray[Any]]:
    """The arrays of a shard."""
    arrays = {
        "class_id": np.asarray(rows.class_id, class_dtype(form)),
        "log_prob": np.asarray(rows.log_prob, "<f2"),
        "log_tail": np.asarray(rows.log_tail, "<f4"),
    }
    if not form.ragged:
        return arrays
    assert rows.count is not None
    kept = np.arange(rows.class_id.shape[1]) < rows.count[:, None]
    for name in ("class_id", "log_prob"):
        arrays[name] = arrays[name][kept]
    return {"count": rows.count.astype("<u2"), **arrays}


def open(datasets: Mapping[str, NDArray[Any]], n: int, form: RowFormat) -> Opened:
    """Open the arrays of a shard of n rows.

    Raises:
        ValueError: an array is missing, or of another type or shape than these rows have.
    """
    count = start = None
    shape: tuple[int, ...] = (n, form.width)
    if form.ragged:
        count = array(datasets, "count", "<u2", (n,)).astype(np.int64)
        end = count.cumsum()
        start, shape = end - count, (int(count.sum()),)
        if n and not (count.min() >= 1 and count.max() <= form.width):
            raise ValueError(f"count has rows of {count.min()} to {count.max()} entries")
    return Opened(
        class_id=array(datasets, "class_id", class_dtype(form), shape),
        log_prob=array(datasets, "log_prob", "<f2", shape),
        log_tail=array(datasets, "log_tail", "<f4", (n,)),
        count=count,
        start=start,
    )


def check(opened: Opened, form: RowFormat) -> None:
    """
    Raises:
        ValueError: a value is none that a row can have.
    """
    if opened.class_id.size and opened.class_id.max() >= form.num_classes:
        raise ValueError(f"class_id has class {opened.class_id.max()} of {form.num_classes}")
    for name, values in (("log_prob", opened.log_prob), ("log_tail", opened.log_tail)):
        # NaN is not at most 0 either. (Sums of float32 may be a little above 1.)
        if not (values <= np.float16(0.001)).all():
            raise ValueError(f"{name} has values that are no log-probabilities")


def take(parts: Sequence[tuple[Opened, NDArray[np.int64]]], form: RowFormat) -> Taken:
    """Some rows of several shards, part behind part."""
    n = sum(len(at) for _, at in parts)
    class_id = np.empty((n, form.width), class_dtype(form))
    log_prob = np.empty((n, form.width), np.float16)
    log_tail = np.empty(n, np.float32)
    count = np.empty(n, np.int64) if form.ragged else None
    end = 0
    for opened, at in parts:
        here = slice(end, end := end + len(at))
        # In this mode numpy writes straight to `out`; the rows were found in the shard, so none is clipped.
        opened.log_tail.take(at, out=log_tail[here], mode="clip")
        if count is None:
            opened.class_id.take(at, axis=0, out=class_id[here], mode="clip")
            opened.log_prob.take(at, axis=0, out=log_prob[here], mode="clip")
        else:
            assert opened.count is not None
            assert opened.start is not None
            opened.count.take(at, out=count[here], mode="clip")
            entries = np.arange(form.width)
            padding = entries >= count[here, None]
            flat = np.where(padding, 0, opened.start[at, None] + entries)
            class_id[here] = np.where(padding, 0, opened.class_id[flat])
            log_prob[here] = np.where(padding, -np.inf, opened.log_prob[flat])
    return class_id, log_prob, log_tail, count


def array(
    datasets: Mapping[str, NDArray[Any]], name: str, dtype: np.dtype[Any] | str, shape: tuple[int, ...]
) -> NDArray[Any]:
    """One array of a shard.

    Raises:
        ValueError: it is missing, or of another type or shape.
    """
    found = datasets.get(name)
    if found is None:
        raise ValueError(f"{name} is missing")
    if found.dtype != np.dtype(dtype) or found.shape != shape:
        raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not {np.dtype(dtype)} {list(shape)}")
    return found
