"""Reading a store: any rows of a view, by sample id. Mirror of `writer`."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import DamagedError
from distill_cli.files import sha256_file
from distill_cli.store.exact import ADVICE, Rows, Shard, dtypes, open_shard
from distill_cli.store.plan import Manifest, Plan, read_manifest, read_plan, shard_path

OPEN_SHARDS = 256
"""Memory maps held at once: each holds a file descriptor, of which a process may commonly have 1,024."""


class Store:
    """A complete store.

    Shards are opened when first asked for, after their checksum, and never travel: a copy made by fork or pickle
    opens its own.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            DamagedError: there is no store, or it is not complete.
            MismatchError: it is of another format version.
        """
        self.path = path
        self.plan: Plan = read_plan(path)
        self.manifest: Manifest = read_manifest(path, self.plan)
        self._entries = {entry.path: entry for entry in self.manifest.shards}
        self._verified: set[str] = set()
        self._open: OrderedDict[tuple[int, int], Shard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """The samples that have rows, ascending."""
        return np.setdiff1d(np.arange(self.plan.samples), np.array(self.manifest.skipped, np.int64))

    def rows(self, view: int, sample_ids: NDArray[np.int64]) -> Rows:
        """The rows of some samples, in their order.

        Args:
            sample_ids: int64 `[n]`, any order, each one in `sample_ids` of the store.

        Raises:
            DamagedError: a shard is missing or damaged, or has no row for a sample.
        """
        places = self.plan.dealing.place(sample_ids)
        shards = places // self.plan.shard_rows
        dtype = dtypes(self.plan)["class_id"]
        n, k = len(sample_ids), self.plan.top_k
        out = Rows(sample_ids, np.empty((n, k), dtype), np.empty((n, k), np.float16), np.empty(n, np.float32))
        for shard in np.unique(shards):
            chosen = np.flatnonzero(shards == shard)
            rows = self.shard(view, int(shard)).rows
            at = self._find(rows, places[chosen] - shard * self.plan.shard_rows, sample_ids[chosen])
            out.class_id[chosen] = rows.class_id[at]
            out.log_prob[chosen] = rows.log_prob[at]
            out.log_tail[chosen] = rows.log_tail[at]
        return out

    def shard(self, view: int, shard: int) -> Shard:
        """One shard, its checksum verified when it is first opened.

        Raises:
            DamagedError: it is missing, or not what the manifest says.
        """
        if (view, shard) not in self._open:
            relative = shard_path(view, shard)
            path = self.path / relative
            if relative not in self._verified:
                self._verify(path, self._entries[relative].sha256)
                self._verified.add(relative)
            self._open[view, shard] = open_shard(path, self.plan, view, shard)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end((view, shard))
        return self._open[view, shard]

    def _verify(self, path: Path, expected: str) -> None:
        """Before HDF5 sees a byte of it: the library can crash on, or never return from, a damaged file."""
        try:
            found = sha256_file(path)
        except FileNotFoundError:
            raise DamagedError(f'{path}: missing; run the same "distill teacher-logits" command again') from None
        if found != expected:
            raise DamagedError(f"{path}: its sha256 is not the manifest's; {ADVICE}")

    def _find(self, rows: Rows, places: NDArray[np.int64], sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each sample in its shard: its place, unless skipped samples moved the rows up."""
        at = places
        if len(rows) < self.plan.shard_rows:
            there = self.plan.dealing.place(rows.sample_id.astype(np.int64)) % self.plan.shard_rows
            at = np.minimum(np.searchsorted(there, places), max(0, len(rows) - 1))
        if len(rows) == 0 or not np.array_equal(rows.sample_id[at], sample_ids):
            raise DamagedError(
                f"{self.path}: no row for a sample that was asked for; the store does not cover this data"
            )
        return at
