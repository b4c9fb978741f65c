"""`distill store export parquet`: rows as a table that any data tool reads."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import MismatchError, UsageError
from distill_cli.files import atomic_file
from distill_cli.locks import locked
from distill_cli.report import Report
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows

SUFFIX = ".parquet"
STORE, PLANS, VIEWS = b"distill.store", b"distill.plans", b"distill.views"
"""Metadata of a file: the store's id, the text of its plans, and the views that are in the file."""


@dataclass(frozen=True)
class Exported:
    status: str
    """`done` or `already_done`."""
    out: str
    rows: int
    views: int
    files: int
    bytes: int
    store_id: str
    wall_s: float


def export_parquet(source: Store, out: Path, report: Report | None = None) -> Exported:
    """Write all rows to one file, or a file of each view to a folder; a row group is a shard, its rows by place.

    view int32, sample_id uint32 | uint64, class_id list<uint16 | uint32>, log_prob list<float32>, log_tail float32

    Args:
        out: a file if its name ends in `.parquet`, else a folder.

    Raises:
        UsageError: pyarrow is not installed, or `out` is something else.
        MismatchError: a file at `out` is of another store.
        DamagedError: a shard is missing or damaged.
        BusyError: another process works there.
    """
    _pyarrow()
    report, start = report or Report(), time.monotonic()
    if out.suffix == SUFFIX:
        folder, wanted = out.parent, {out: list(range(source.views))}
    else:
        folder, wanted = out, {out / f"view-{view:03d}{SUFFIX}": [view] for view in range(source.views)}
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; --out names a folder, or a file that ends in {SUFFIX}")
    missing = [path for path in wanted if not _is_there(path, source, wanted[path])]
    rows = {
        view: sum(source.entry(view, shard).rows for shard in _shards(source, view)) for view in range(source.views)
    }
    total = sum(rows.values())
    if missing:
        left = sum(rows[view] for path in missing for view in wanted[path])
        with locked(folder), report.progress("export", total, total - left, "rows") as progress:
            for path in missing:
                for count in _write(path, source, wanted[path]):
                    progress.advance(count)
    else:
        report.stage(f"{out}: complete already, {total} rows")
    return Exported(
        status="done" if missing else "already_done",
        out=str(out),
        rows=total,
        views=source.views,
        files=len(wanted),
        bytes=sum(path.stat().st_size for path in wanted),
        store_id=source.id,
        wall_s=round(time.monotonic() - start, 2),
    )


def _write(path: Path, source: Store, views: Sequence[int]) -> Iterator[int]:
    """Write one file, shard by shard; gives the rows of each."""
    import pyarrow.parquet

    schema = _schema(source, views)
    with atomic_file(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for view in views:
            for shard in _shards(source, view):
                rows = source.rows(view, source.ids(view, shard))
                if len(rows):
                    writer.write_table(_table(rows, view, schema), row_group_size=len(rows))
                yield len(rows)


def _schema(source: Store, views: Sequence[int]) -> Any:
    import pyarrow as pa

    metadata = {
        STORE: source.id.encode(),
        PLANS: json.dumps([generation.plan.text for generation in source.generations]).encode(),
        VIEWS: json.dumps(list(views)).encode(),
    }
    columns = {
        "view": pa.int32(),
        "sample_id": pa.uint32() if source.plan.samples <= 2**32 else pa.uint64(),
        "class_id": pa.list_(pa.uint16() if source.plan.num_classes < 2**16 else pa.uint32()),
        "log_prob": pa.list_(pa.float32()),
        "log_tail": pa.float32(),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()], metadata)


def _table(rows: Rows, view: int, schema: Any) -> Any:
    import pyarrow as pa

    n, k = rows.class_id.shape
    count = np.full(n, k) if rows.count is None else rows.count
    offsets = np.concatenate([[0], count.cumsum()]).astype(np.int32)
    kept = np.arange(k) < count[:, None]

    def lists(name: str, values: NDArray[Any]) -> Any:
        kind = schema.field(name).type
        return pa.ListArray.from_arrays(offsets, pa.array(values[kept], kind.value_type), kind)

    columns = {
        "view": pa.array(np.full(n, view, np.int32)),
        "sample_id": pa.array(rows.sample_id, schema.field("sample_id").type),
        "class_id": lists("class_id", rows.class_id),
        "log_prob": lists("log_prob", rows.log_prob.astype(np.float32)),
        "log_tail": pa.array(rows.log_tail, pa.float32()),
    }
    return pa.table(columns, schema)


def _is_there(path: Path, source: Store, views: Sequence[int]) -> bool:
    """
    Raises:
        MismatchError: the file is another's.
    """
    import pyarrow as pa
    import pyarrow.parquet

    if not path.exists():
        return False
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise MismatchError(f"{path}: is there, and no Parquet ({error}); choose another --out") from error
    there = metadata.get(STORE, b"none").decode()
    if there != source.id or metadata.get(VIEWS) != json.dumps(list(views)).encode():
        raise MismatchError(
            f"{path}: holds rows of another store ({there[:12]}, {source.id[:12]}: there, asked); choose another --out"
        )
    return True


def _pyarrow() -> None:
    """
    Raises:
        UsageError: it is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UsageError("export parquet needs pyarrow: pip install 'distill-cli[parquet]'") from None


def _shards(source: Store, view: int) -> range:
    return range(source.generation_of(view)[0].plan.shards)
