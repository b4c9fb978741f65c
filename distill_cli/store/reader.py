"""Reading a store: any rows of a view, by sample id. Mirror of `writer`."""

import itertools
import resource
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import BusyError, DamagedError
from distill_cli.files import sha256_file
from distill_cli.locks import holder_of
from distill_cli.store.codecs import CODECS
from distill_cli.store.manifest import Manifest, ShardEntry, read_manifest
from distill_cli.store.place import Folder, Place
from distill_cli.store.plan import Generation, Plan, read_generations, store_id
from distill_cli.store.rows import Rows, Taken
from distill_cli.store.shard import Shard, check_rows, open_shard

OPEN_SHARDS = 4096
"""Memory maps held at once at most: each holds a file descriptor, of which a store takes a quarter of the process's."""
MEMORY_MB = 1024
Part = tuple[Any, NDArray[np.int64]]
"""An open shard as its codec knows it, and which of its rows are asked for."""


class Store:
    """A store whose generations are complete; views are numbered through all of them.

    Shards are opened when first asked for, after their checksum, and never travel: a copy made by fork or pickle
    opens its own.
    """

    beside: "tuple[Store, ...]" = ()
    """Stores of the same inputs with whose rows its own are averaged."""

    def __init__(self, place: Path | Place, memory_mb: int = MEMORY_MB, trust: bool = False, share: int = 1) -> None:
        """
        Args:
            memory_mb: of shards that are mapped at once, in MiB; at least one is.
            trust: take shards without looking at their checksums.
            share: stores that share this memory and the process's file descriptors.

        Raises:
            DamagedError: there is no store, or it is not complete.
            BusyError: it is not complete, and a capture is at work on it.
            MismatchError: it is of another format version.
        """
        self.place: Place = Folder(place) if isinstance(place, Path) else place
        self.memory = memory_mb * 2**20 // share
        self.trust = trust
        self.open_shards = max(1, min(OPEN_SHARDS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4) // share)
        found = read_generations(self.place)
        manifests = (read_manifest(self.place, generation) for generation in found)
        complete = [manifest for manifest in itertools.takewhile(lambda manifest: manifest, manifests) if manifest]
        if not complete:
            raise _unfinished(self.place, found[0])
        self.generations = found[: len(complete)]
        self.manifests = complete
        self.unfinished_views = sum(generation.plan.views for generation in found[len(complete) :])
        """Views that a capture is still to finish, and that are not read."""
        self._verified: set[str] = set()
        self._open: OrderedDict[tuple[int, int], Shard] = OrderedDict()
        self._mapped = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_mapped": 0}

    def __str__(self) -> str:
        return str(self.place)

    @property
    def plan(self) -> Plan:
        """Of the first generation: teacher, data, samples and transform are those of all."""
        return self.generations[0].plan

    @property
    def id(self) -> str:
        return store_id([generation.plan for generation in self.generations])

    @property
    def num_classes(self) -> int:
        """Of its rows."""
        return self.plan.num_classes

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Their names, where the teacher has them."""
        names: list[str] | None = self.plan.teacher["classes"]
        return None if names is None else tuple(names)

    @property
    def views(self) -> int:
        """Of all generations."""
        last = self.generations[-1]
        return last.offset + last.plan.views

    @property
    def drawn(self) -> tuple[tuple[int, int], ...]:
        """(seed, view) by which the inputs of each view are drawn."""
        return sum((generation.plan.drawn for generation in self.generations), ())

    @property
    def stores(self) -> "tuple[Store, ...]":
        """Itself, and those beside it."""
        return (self, *self.beside)

    @property
    def sampled(self) -> bool:
        """Whether rows of some view hold draws from the tail: unbiased at temperature 1 only."""
        return any(generation.plan.sample for generation in self.generations)

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """The samples that have rows in every view, ascending.

        Raises:
            DamagedError: the first shard is missing or has another size.
        """
        # Of a plan with more samples than the store can hold, no list is made.
        self._file(self.entry(0, 0))
        skipped = [sample_id for manifest in self.manifests for sample_id in manifest.skipped]
        return np.setdiff1d(np.arange(self.plan.samples), np.array(skipped, np.int64))

    def generation_of(self, view: int) -> tuple[Generation, Manifest, int]:
        """The generation of a view, its manifest, and the view's number within it."""
        for generation, manifest in zip(self.generations, self.manifests, strict=True):
            if view - generation.offset < generation.plan.views:
                return generation, manifest, view - generation.offset
        raise IndexError(f"view {view} of {self.views}")

    def entry(self, view: int, shard: int) -> ShardEntry:
        """What the manifest says of a shard."""
        generation, manifest, within = self.generation_of(view)
        return manifest.shards[within * generation.plan.shards + shard]

    def rows(self, view: int, sample_ids: NDArray[np.int64]) -> Rows:
        """The rows of some samples, in their order.

        Args:
            sample_ids: int64 `[n]`, any order, each one in `sample_ids` of the store.

        Raises:
            DamagedError: a shard is missing or damaged, or has no row for a sample.
        """
        dealing = self.generation_of(view)[0].plan.dealing
        # The dealing would find a place for any number.
        if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < self.plan.samples:
            raise self._no_row()
        places = dealing.place(sample_ids)
        order = np.argsort(places, kind="stable")
        places = places[order]
        shards = dealing.shard_of(places)
        first = np.flatnonzero(np.diff(shards, prepend=-1))
        parts, taken, mapped = list[Part](), list[Taken](), 0
        for start, stop in itertools.pairwise([*first.tolist(), len(places)]):
            number = int(shards[start])
            size = self.entry(view, number).bytes
            if parts and (len(parts) == self.open_shards or mapped + size > self.memory):
                # A part keeps its shard mapped, whatever this store lets go of.
                taken.append(self._take(view, parts))
                parts, mapped = [], 0
            parts.append(self._part(view, number, places[start:stop] - dealing.places(number).start))
            mapped += size
        taken.append(self._take(view, parts))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        class_id, log_prob, log_tail, count = _joined(taken)
        return Rows(sample_ids, class_id[back], log_prob[back], log_tail[back], None if count is None else count[back])

    def _part(self, view: int, shard: int, places: NDArray[np.int64]) -> Part:
        opened = self.shard(view, shard)
        try:
            return opened.rows, opened.find(places)
        except KeyError:
            raise self._no_row() from None

    def _take(self, view: int, parts: list[Part]) -> Taken:
        plan = self.generation_of(view)[0].plan
        try:
            return CODECS[plan.codec].take(parts, plan.form)
        except ValueError as error:
            raise DamagedError(f"{self}: view {view}: {error}; {self.place.advice}") from error

    def ids(self, view: int, shard: int) -> NDArray[np.int64]:
        """The samples that have rows in a shard, by place.

        Raises:
            DamagedError: as `shard`.
        """
        wanted = self.generation_of(view)[0].plan.dealing.sample_ids(shard)
        return np.delete(wanted, self.shard(view, shard).skipped)

    def lacks(self, view: int, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some samples have no row in a view, as their images could not be decoded.

        Raises:
            DamagedError: as `shard`.
        """
        generation, manifest, _ = self.generation_of(view)
        lacking = np.isin(sample_ids, np.array(manifest.skipped, np.int64))
        places = generation.plan.dealing.place(sample_ids[lacking])
        for number, place in zip(np.flatnonzero(lacking), places.tolist(), strict=True):
            shard, within = divmod(place, generation.plan.shard_rows)
            lacking[number] = within in self.shard(view, shard).skipped
        return lacking

    def shard(self, view: int, shard: int) -> Shard:
        """One shard, its checksum verified and its values looked at when it is first opened.

        Raises:
            DamagedError: it is missing, or not what the manifest says.
        """
        if (view, shard) in self._open:
            self._open.move_to_end((view, shard))
            return self._open[view, shard]
        generation, _, within = self.generation_of(view)
        entry = self.entry(view, shard)
        path = self._file(entry)
        known = self.trust or entry.path in self._verified
        if not known and sha256_file(path) != entry.sha256:
            raise DamagedError(f"{path}: its sha256 is not the manifest's; {self.place.advice}")
        while self._open and (len(self._open) == self.open_shards or self._mapped + entry.bytes > self.memory):
            self._mapped -= self._open.popitem(last=False)[1].size
        opened = open_shard(path, generation.plan, within, shard)
        if not known:
            check_rows(path, opened, generation.plan, shard)
            self._verified.add(entry.path)
        self._open[view, shard] = opened
        self._mapped += opened.size
        return opened

    def _no_row(self) -> DamagedError:
        return DamagedError(f"{self}: no row for a sample that was asked for; the store does not cover this data")

    def _file(self, entry: ShardEntry) -> Path:
        try:
            path = self.place.file(entry.path, entry.sha256)
            found = path.stat()
            # A pipe would keep the reader waiting, and a device would have no end.
            if not stat.S_ISREG(found.st_mode):
                raise DamagedError(f"{path}: not a file; {self.place.advice}")
            if found.st_size == entry.bytes:
                return path
        except FileNotFoundError:
            raise DamagedError(
                f'{self.place}/{entry.path}: missing; run the same "distill teacher-logits" command again'
            ) from None
        raise DamagedError(f"{path}: its size is not the manifest's; {self.place.advice}")


def _joined(taken: list[Taken]) -> Taken:
    if len(taken) == 1:
        return taken[0]
    class_id, log_prob, log_tail, count = zip(*taken, strict=True)
    columns = np.concatenate(class_id), np.concatenate(log_prob), np.concatenate(log_tail)
    return *columns, None if count[0] is None else np.concatenate(count)


def _unfinished(place: Place, generation: Generation) -> DamagedError | BusyError:
    """Why a store cannot be read yet: somebody writes it, or should go on doing so."""
    total = generation.plan.views * generation.plan.shards
    where = f"{place}: incomplete"
    holder = None
    if isinstance(place, Folder):
        # Counted only as far as there are files, whatever the plan says there should be.
        present = sum(1 for _ in place.path.glob("view-*/shard-*.h5"))
        where, holder = f"{place}: {total - present} of {total} shards missing", holder_of(place.path)
    if holder:
        return BusyError(f"{where}, and {holder} is writing them; wait for it to finish")
    return DamagedError(f'{where}; run the same "distill teacher-logits" command again to finish it')
