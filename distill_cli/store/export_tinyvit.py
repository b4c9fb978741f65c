"""`distill store export tinyvit`: a store as the files that TinyViT's own code reads."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.derive import derive
from distill_cli.errors import DamagedError, MismatchError
from distill_cli.files import canonical_json, check_ours, fsync_directory, write_json
from distill_cli.locks import locked
from distill_cli.report import Report
from distill_cli.store.reader import Store
from distill_cli.store.tinyvit import RankWriter, record_dtype, to_records

MARK = "export.json"
"""Says of which store a folder of exported files is; TinyViT's code does not look at it."""
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Exported:
    status: str
    """`done` or `already_done`."""
    out: str
    rows: int
    epochs: int
    bytes: int
    """Of the values."""
    store_id: str
    wall_s: float


def export_tinyvit(
    source: Store, out: Path, keys: Sequence[str] | None = None, report: Report | None = None
) -> Exported:
    """Write each view as the folder of an epoch, of one rank, by ascending sample id.

    Rows that were imported have the numbers, seeds and, with the codec `exact`, the very bits that they came with. The
    seed of others is what their view was drawn by (its low 31 bits), which TinyViT's code draws other pixels from.

    Args:
        keys: of every sample; by default its id.

    Raises:
        MismatchError: rows have not all the same number of classes, or more classes than the format has room for; or
            `out` has the files of another store.
        UsageError: `out` is something else.
        DamagedError: a shard is missing or damaged.
        BusyError: another process works on `out`.
    """
    report, start = report or Report(), time.monotonic()
    k = _check_form(source)
    identity = {"format": "tinyvit", "store": source.id, "keys": "index" if keys is None else "given"}
    _check_out(out, identity)
    rows = [
        sum(source.entry(view, shard).rows for shard in range(_shards(source, view))) for view in range(source.views)
    ]
    folders = [out / f"logits_top{k}_epoch{number}" for number in _numbers(source)]
    missing = [view for view, folder in enumerate(folders) if not folder.exists()]
    summary = Exported(
        status="done" if missing else "already_done",
        out=str(out),
        rows=sum(rows),
        epochs=source.views,
        bytes=sum(rows) * record_dtype(k).itemsize,
        store_id=source.id,
        wall_s=0,
    )
    if not missing:
        report.stage(f"{out}: complete already, {sum(rows)} rows")
        return summary
    with (
        locked(out),
        report.progress("export", sum(rows), sum(rows) - sum(rows[view] for view in missing), "rows") as progress,
    ):
        if not (out / MARK).exists():
            write_json(out / MARK, identity)
        for leftover in out.glob(f"{TEMPORARY}logits_top*"):
            shutil.rmtree(leftover)
        for view in missing:
            temporary = folders[view].with_name(f"{TEMPORARY}{folders[view].name}")
            temporary.mkdir()
            for count in _write_epoch(source, view, temporary, k, keys):
                progress.advance(count)
            fsync_directory(temporary)
            temporary.rename(folders[view])
            fsync_directory(out)
    return Exported(**{**summary.__dict__, "wall_s": round(time.monotonic() - start, 2)})


def _write_epoch(source: Store, view: int, folder: Path, k: int, keys: Sequence[str] | None) -> Iterator[int]:
    """Each shard is read once and its records strewn to where their samples stand; gives the rows of each."""
    shards = range(_shards(source, view))
    present = np.ones(source.plan.samples, bool)
    for shard in shards:
        skipped = source.shard(view, shard).skipped
        present[source.generation_of(view)[0].plan.dealing.sample_ids(shard)[skipped]] = False
    place = present.cumsum() - 1
    with RankWriter(folder, 0, k, int(present.sum())) as writer:
        for shard in shards:
            ids = source.ids(view, shard)
            extra = source.shard(view, shard).extra
            seed = extra["seed"] if "seed" in extra else _seeds(source, view, ids)
            writer.records[place[ids]] = to_records(source.rows(view, ids), seed, extra.get("correction"))
            yield len(ids)
        writer.write_keys(str(i) if keys is None else keys[i] for i in np.flatnonzero(present).tolist())


def _seeds(source: Store, view: int, sample_ids: NDArray[np.int64]) -> NDArray[np.int32]:
    seed, drawn = source.drawn[view]
    return np.array([derive("view", seed, drawn, int(i)) & 0x7FFFFFFF for i in sample_ids], np.int32)


def _numbers(source: Store) -> list[int]:
    """Of the epoch that each view is: its own where it was one, else one after the other."""
    imported = source.plan.transform.get("augment") == "tinyvit"
    return [drawn if imported else view for view, (_, drawn) in enumerate(source.drawn)]


def _shards(source: Store, view: int) -> int:
    return source.generation_of(view)[0].plan.shards


def _check_form(source: Store) -> int:
    """
    Raises:
        MismatchError: the rows are none that TinyViT's records can hold.
    """
    plans: list[Any] = [generation.plan for generation in source.generations]
    if any(plan.form.ragged for plan in plans):
        raise MismatchError(
            f"store {source}: its rows differ in their number of classes (keep_mass or sample), TinyViT's records do "
            "not; write a store with --top-k alone, or use export parquet"
        )
    kept = sorted({plan.top_k for plan in plans})
    if len(kept) > 1:
        raise MismatchError(
            f"store {source}: its views keep {' and '.join(map(str, kept))} classes, TinyViT's records one number; "
            f'use "distill store trim --top-k {kept[0]}" first'
        )
    if source.plan.num_classes > 2**16:
        raise MismatchError(
            f"store {source}: has {source.plan.num_classes} classes, TinyViT's records room for {2**16}; "
            "use export parquet"
        )
    return int(kept[0])


def _check_out(out: Path, identity: dict[str, str]) -> None:
    """
    Raises:
        UsageError, MismatchError, DamagedError: `out` has other files.
    """
    check_ours(out, (MARK,), "folder of exported logits")
    path = out / MARK
    if path.exists() and path.read_text() != canonical_json(identity, indent=2) + "\n":
        try:
            there = json.loads(path.read_text())
            differing = [
                f"{name}: {there.get(name)}, {value}" for name, value in identity.items() if there.get(name) != value
            ]
        except (ValueError, AttributeError) as error:
            raise DamagedError(f"{path}: not JSON ({error}); delete the folder, or choose another --out") from error
        raise MismatchError(f"{out}: holds another export ({'; '.join(differing)}: there, asked); choose another --out")
