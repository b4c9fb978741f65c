"""`distill store check --files`: whether the image files are still those that a store was written from."""

import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from distill_cli.data import open_train
from distill_cli.data.images import printable
from distill_cli.data.loader import in_workers
from distill_cli.data.sources import Source, UnreadableImage
from distill_cli.distributed import Signals, World, stopped
from distill_cli.errors import DistillError, MismatchError
from distill_cli.recipe import Recipe
from distill_cli.replay import check_data
from distill_cli.report import Report
from distill_cli.store import open_store
from distill_cli.store.reader import Store
from distill_cli.store.shard import CONTENT_CRC

FILES = 256
"""Read by a loader process at a time."""
NAMED = 5
"""Changed files that are named."""


@dataclass(frozen=True)
class Summary:
    status: str
    """`ok` or `changed`."""
    store: str
    files: int
    """That were read; those that the capture skipped are not."""
    changed: int
    """Others than they were, or no longer to be read."""
    first_changed: tuple[str, ...]
    """The keys of the first of them."""
    files_per_s: float
    wall_s: float


def check_files(recipe: Recipe, world: World, report: Report | None = None) -> Summary:
    """Read every file of `recipe.data` that the store `recipe.store.path` has a row of, once, and compare its CRC-32
    with the one that was kept of it.

    Raises:
        MismatchError: the store is of other data, or keeps no such checksums.
        DamagedError: the store is incomplete or damaged.
        Stopped: a signal came.
    """
    report, start = report or Report(), time.monotonic()
    assert isinstance(recipe.store.path, str), "the command names a store"
    store = open_store(recipe.store.path, recipe.store)
    report.stage("opening the data")
    source = open_train(recipe.data, report)
    check_data(store, source)
    kept = list(_kept(store))
    wanted = np.unique(np.concatenate([ids for ids, _ in kept]))
    report.stage(f"reading {len(wanted)} files")
    ready = time.monotonic()
    found = _read(store, source, wanted, world, report)
    changed = {int(i) for ids, crc in kept for i in ids[found[np.searchsorted(wanted, ids)] != crc]}
    return Summary(
        status="changed" if changed else "ok",
        store=str(store),
        files=len(wanted),
        changed=len(changed),
        first_changed=tuple(printable(source.keys[i]) for i in sorted(changed)[:NAMED]),
        files_per_s=round(len(wanted) / max(time.monotonic() - ready, 1e-3), 1),
        wall_s=round(time.monotonic() - start, 2),
    )


def check_unchanged(summary: Summary) -> None:
    """
    Raises:
        MismatchError: files have changed; the first of them are named.
    """
    if summary.changed:
        more = ", …" if summary.changed > len(summary.first_changed) else ""
        raise MismatchError(
            f"store {summary.store}: {summary.changed:,} of {summary.files:,} files are not those that the teacher saw "
            f"({', '.join(summary.first_changed)}{more}); restore them, or write a new store"
        )


def _kept(store: Store) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]]:
    """Sample ids and their checksums, shard by shard of each generation's first view.

    Raises:
        MismatchError: there are none.
    """
    for generation in store.generations:
        for shard in range(generation.plan.shards):
            opened = store.shard(generation.offset, shard)
            if CONTENT_CRC not in opened.extra:
                raise MismatchError(
                    f"store {store}: keeps no checksums of its files, as it was written by an earlier "
                    "version; compare its rows by --teacher instead of --files, or write it anew"
                )
            yield store.ids(generation.offset, shard), opened.extra[CONTENT_CRC]


@dataclass(frozen=True)
class _Contents(Dataset["NDArray[np.int64] | DistillError"]):
    """Number -> the CRC-32 of some contents; -1 where one cannot be read."""

    source: Source
    sample_ids: NDArray[np.int64]

    def __getitem__(self, number: int) -> NDArray[np.int64] | DistillError:
        try:
            ids = self.sample_ids[number * FILES : (number + 1) * FILES]
            return np.array([self._crc(sample_id) for sample_id in ids.tolist()])
        except DistillError as error:
            return error

    def _crc(self, sample_id: int) -> int:
        try:
            return zlib.crc32(self.source.content(sample_id))
        except UnreadableImage:
            return -1


def _read(
    store: Store, source: Source, sample_ids: NDArray[np.int64], world: World, report: Report
) -> NDArray[np.int64]:
    numbers, found = range(-(-len(sample_ids) // FILES)), []
    with (
        Signals() as signals,
        report.progress("check", len(sample_ids), unit="files") as progress,
        closing(in_workers(_Contents(source, sample_ids), numbers, world.workers)) as read,
    ):
        for part in read:
            found.append(part)
            progress.advance(len(part))
            if signals.received:
                raise stopped(signals.received, f"{store}: was not checked to the end; nothing was written")
    return np.concatenate(found)
