"""Filling a store: the plan first, shards one by one, the manifest last. Mirror of `reader`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.files import remove_temporaries, sha256, write_atomic
from distill_cli.store.manifest import Manifest, ShardEntry, read_manifest
from distill_cli.store.place import ADVICE, Folder
from distill_cli.store.plan import Generation, Plan, read_plan
from distill_cli.store.rows import Rows
from distill_cli.store.shard import HEADER_BYTES, Shard, encode, open_shard, read_header


@dataclass(frozen=True)
class Finished:
    """What a manifest is made of: one shard."""

    entry: ShardEntry
    top1: int | None
    """Rows whose label is the first class; None without labels."""
    top5: int | None
    skipped: tuple[int, ...]
    """Ids of the samples without a row."""


def finished(plan: Plan, shard: int, opened: Shard, entry: ShardEntry) -> Finished:
    """What an open shard says for the manifest."""
    # Where nothing was skipped, which is nearly always, the dealing need not be worked out.
    skipped = plan.dealing.sample_ids(shard)[opened.skipped].tolist() if len(opened.skipped) else []
    return Finished(entry, opened.header.top1, opened.header.top5, tuple(skipped))


def manifest_of(plan: Plan, shards: Sequence[Finished]) -> Manifest:
    """The manifest of a generation, from all of its shards in order; no label is needed, shards have counted."""
    rows = sum(shard.entry.rows for shard in shards)
    return Manifest(
        plan_sha256=plan.sha256,
        shards=tuple(shard.entry for shard in shards),
        skipped=tuple(sorted({sample_id for shard in shards for sample_id in shard.skipped})),
        top1=_percent([shard.top1 for shard in shards], rows),
        top5=_percent([shard.top5 for shard in shards], rows),
    )


Hits = tuple[int | None, int | None]
"""Rows whose label is the first class, and among the first five; None where that is not known."""


class StoreWriter:
    """Writes the missing shards of a generation; killed at any moment, another writer of the same plan goes on.

    The caller holds the directory's lock, or shares it and has claimed each shard that he writes.
    """

    def __init__(self, path: Path, generation: Generation | Plan, labels: NDArray[np.int64] | None = None) -> None:
        """
        Args:
            labels: per sample its class id, by which shards tell the teacher's own accuracy.

        Raises:
            MismatchError: the directory holds a store of another plan; the differing fields are named.
        """
        self.path, self.labels = path, labels
        self.generation = Generation(0, generation) if isinstance(generation, Plan) else generation
        self.plan = self.generation.plan
        self._written: dict[tuple[int, int], ShardEntry] = {}
        if check_plan(path, self.generation) is None:
            # Of a store that lost shards since: without it the store is unfinished, as it is.
            (path / self.generation.manifest_name).unlink(missing_ok=True)
        if not (path / self.generation.plan_name).exists():
            write_atomic(path / self.generation.plan_name, self.plan.text)

    def missing(self) -> Iterator[tuple[int, int]]:
        """(view, shard) of what is still to be written, in order."""
        return (place for place in self.plan.every_shard() if not self.is_there(*place))

    def is_there(self, view: int, shard: int) -> bool:
        """Whether a shard is written; one that does not open is not."""
        path = self.path / self.generation.path(view, shard)
        if not path.exists():
            return False
        try:
            open_shard(path, self.plan, view, shard)
        except DamagedError:
            return False
        return True

    def write(
        self,
        view: int,
        shard: int,
        rows: Rows,
        probe_crc: NDArray[np.uint32],
        hits: Hits | None = None,
        extra: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """Write one shard: temporary name, fsync, rename.

        Args:
            rows: by place.
            hits: the teacher's own, where they are not those of the samples' labels.
            extra: more arrays of the rows; see `shard.EXTRAS`.

        Raises:
            OSError: the disk is full or the folder cannot be written; nothing is left under the shard's name.
        """
        content = encode(self.plan, view, shard, rows, probe_crc, hits or self.hits(rows), extra)
        relative = self.generation.path(view, shard)
        path = self.path / relative
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, content)
        self._written[view, shard] = ShardEntry(relative, len(rows), len(content), sha256(content))

    def finish(self) -> Manifest:
        """Write the manifest, which makes the generation complete; shards of others are read once for it.

        Raises:
            DamagedError: a shard's bytes are not those that its header says.
        """
        manifest = manifest_of(self.plan, [self._describe(*place) for place in self.plan.every_shard()])
        remove_temporaries(self.path)
        write_atomic(self.path / self.generation.manifest_name, manifest.text)
        return manifest

    def _describe(self, view: int, shard: int) -> "Finished":
        relative = self.generation.path(view, shard)
        path = self.path / relative
        opened = open_shard(path, self.plan, view, shard)
        entry = self._written.get((view, shard)) or ShardEntry(
            relative, len(opened), path.stat().st_size, check_payload(path)
        )
        return finished(self.plan, shard, opened, entry)

    def hits(self, rows: Rows, labels: NDArray[np.int64] | None = None) -> Hits:
        """Rows whose label is the first class, and among the first five; None where rows do not tell.

        Args:
            labels: of the rows, where they are not those of their samples.
        """
        if self.labels is None or self.plan.top_k == 0:
            return None, None
        labels = self.labels[rows.sample_id.astype(np.int64)] if labels is None else labels
        hits = rows.class_id[:, :5] == labels[:, None]
        if rows.count is not None:
            hits &= np.arange(hits.shape[1]) < rows.count[:, None]
        return int(hits[:, :1].sum()), int(hits.sum()) if has_top5(self.plan) else None


def has_top5(plan: Plan) -> bool:
    """Whether each row has its five most probable classes."""
    return (min(plan.top_k, plan.min_k) if plan.keep_mass else plan.top_k) >= 5


def check_payload(path: Path) -> str:
    """The sha256 of a shard file, its header's own sha256 of the rest having been found right.

    Raises:
        DamagedError: the bytes behind the header are not those that it was written with.
    """
    content = path.read_bytes()
    if sha256(content[HEADER_BYTES:]) != read_header(path, content).payload_sha256:
        raise DamagedError(f"{path}: its bytes are not those that were written; {ADVICE}")
    return sha256(content)


def check_plan(path: Path, generation: Generation) -> Manifest | None:
    """The manifest of the complete generation of this plan at `path`; None where there is none, or it lacks shards.

    Raises:
        MismatchError: what is there is a store of another plan; the differing fields are named. (A complete store
            that differs in the versions of libraries only is the same store.)
    """
    place = Folder(path)
    if not place.has(generation.plan_name):
        return None
    there = read_plan(place, generation.number)
    complete = place.has(generation.manifest_name)
    asked = generation.plan
    differing = [line for line in there.differences(asked) if not (complete and line.startswith("software."))]
    if differing:
        more = '; "distill store extend" adds views' if differing[0].startswith("views: ") else ""
        raise MismatchError(
            f"{path}: holds another store ({'; '.join(differing)}: there, asked){more}; "
            "choose another --out, or give the same teacher, data and settings"
        )
    if not complete:
        return None
    manifest = read_manifest(place, Generation(generation.number, there, generation.offset))
    assert manifest is not None
    return manifest if all(_has_size(path / entry.path, entry.bytes) for entry in manifest.shards) else None


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _percent(hits: Sequence[int | None], of: int) -> float | None:
    """The share of hits; None where some shard counted none."""
    counted = [count for count in hits if count is not None]
    return round(100 * sum(counted) / of, 3) if of and len(counted) == len(hits) else None
