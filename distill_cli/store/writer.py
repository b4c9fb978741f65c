"""Filling a store: the plan first, shards one by one, the manifest last. Mirror of `reader`."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.files import remove_temporaries, sha256, sha256_file, write_atomic, write_json
from distill_cli.store.exact import Rows, encode, open_shard
from distill_cli.store.plan import (
    MANIFEST,
    PLAN,
    Manifest,
    Plan,
    ShardEntry,
    read_manifest,
    read_plan,
    shard_path,
)


@dataclass(frozen=True)
class _Described:
    """What the manifest needs to know of one shard."""

    entry: ShardEntry
    skipped: frozenset[int]
    top1: int
    top5: int


class StoreWriter:
    """Writes the missing shards of a store; killed at any moment, another writer of the same plan goes on.

    The caller holds the directory's lock.
    """

    def __init__(self, path: Path, plan: Plan, labels: NDArray[np.int64] | None = None) -> None:
        """
        Args:
            labels: per sample its class id, by which the manifest tells the teacher's own accuracy.

        Raises:
            MismatchError: the directory holds a store of another plan; the differing fields are named.
        """
        self.path, self.plan, self.labels = path, plan, labels
        self._written: dict[tuple[int, int], _Described] = {}
        if check_plan(path, plan) is None:
            # Of a store that lost shards since: without it the store is unfinished, as it is.
            (path / MANIFEST).unlink(missing_ok=True)
        remove_temporaries(path)
        if not (path / PLAN).exists():
            write_atomic(path / PLAN, plan.text)

    def missing(self) -> list[tuple[int, int]]:
        """(view, shard) of what is still to be written; a shard that does not open counts as missing."""
        return [place for place in self.plan.every_shard() if not self._is_there(*place)]

    def write(self, view: int, shard: int, rows: Rows, probe_crc: NDArray[np.uint32]) -> None:
        """Write one shard: temporary name, fsync, rename.

        Raises:
            OSError: the disk is full or the folder cannot be written; nothing is left under the shard's name.
        """
        content = encode(self.plan, view, shard, rows, probe_crc)
        path = self.path / shard_path(view, shard)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, content)
        self._written[view, shard] = self._describe(view, shard, rows, len(content), sha256(content))

    def finish(self) -> Manifest:
        """Write the manifest, which makes the store complete; shards of earlier attempts are read for it."""
        shards = [self._written.get(place) or self._read(*place) for place in self.plan.every_shard()]
        rows = sum(shard.entry.rows for shard in shards)
        judged = rows if self.labels is not None else 0
        manifest = Manifest(
            plan_sha256=self.plan.sha256,
            rows=rows,
            bytes=sum(shard.entry.bytes for shard in shards),
            shards=tuple(shard.entry for shard in shards),
            skipped=tuple(sorted(frozenset[int]().union(*(shard.skipped for shard in shards)))),
            top1=_percent(sum(shard.top1 for shard in shards), judged),
            top5=_percent(sum(shard.top5 for shard in shards), judged) if self.plan.top_k >= 5 else None,
        )
        write_json(self.path / MANIFEST, asdict(manifest))
        return manifest

    def _read(self, view: int, shard: int) -> _Described:
        path = self.path / shard_path(view, shard)
        rows = open_shard(path, self.plan, view, shard).rows
        return self._describe(view, shard, rows, path.stat().st_size, sha256_file(path))

    def _describe(self, view: int, shard: int, rows: Rows, size: int, digest: str) -> _Described:
        hits = np.zeros((len(rows), self.plan.top_k), bool)
        if self.labels is not None:
            hits = rows.class_id == self.labels[rows.sample_id.astype(np.int64)][:, None]
        return _Described(
            ShardEntry(shard_path(view, shard), len(rows), size, digest),
            frozenset(np.setdiff1d(self.plan.dealing.sample_ids(shard), rows.sample_id).tolist()),
            int(hits[:, :1].sum()),
            int(hits[:, :5].sum()),
        )

    def _is_there(self, view: int, shard: int) -> bool:
        path = self.path / shard_path(view, shard)
        if not path.exists():
            return False
        try:
            open_shard(path, self.plan, view, shard)
        except DamagedError:
            return False
        return True


def _percent(hits: int, of: int) -> float | None:
    return round(100 * hits / of, 3) if of else None


def check_plan(path: Path, plan: Plan) -> Manifest | None:
    """The manifest of the complete store of this plan at `path`; None where there is none, or one that lacks shards.

    Raises:
        MismatchError: what is there is a store of another plan; the differing fields are named. (A complete store
            that differs in the versions of libraries only is the same store.)
    """
    if not (path / PLAN).exists():
        return None
    there = read_plan(path)
    complete = (path / MANIFEST).exists()
    differing = [line for line in there.differences(plan) if not (complete and line.startswith("software."))]
    if differing:
        raise MismatchError(
            f"{path}: holds another store ({'; '.join(sorted(differing))}: there, asked); "
            "choose another --out, or give the same teacher, data and settings"
        )
    if not complete:
        return None
    manifest = read_manifest(path, there)
    return manifest if all(_has_size(path / entry.path, entry.bytes) for entry in manifest.shards) else None


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
