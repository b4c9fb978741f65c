"""Several teachers: stores of the same inputs as one, each brought to the student's classes."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.averaging import EmptyRow, average, gather
from distill_cli.class_maps import NEW, read_class_map
from distill_cli.data.config import View
from distill_cli.data.views import check_replayable, read_view
from distill_cli.errors import DistillError, MismatchError, UsageError
from distill_cli.files import canonical_json, sha256
from distill_cli.store import open_place, open_store
from distill_cli.store.config import StoreConfig
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows

COLOURS = ("mean", "std")
"""The fields of a view in which teachers may differ: nothing that is drawn depends on them."""
ClassMap = NDArray[np.int64]
"""By class of the student its class in a store."""


class Ensemble(Store):
    """The first of some stores, its rows averaged with those of the others; each first gathered by its class map.

    Views, order, partners and all else but rows are those of the first, and have been compared with the others'.
    """

    def __init__(self, paths: Sequence[str], config: StoreConfig) -> None:
        """
        Raises:
            UsageError, MismatchError: stores, weights and class maps do not fit each other.
            DamagedError, BusyError: as `Store`.
        """
        super().__init__(open_place(paths[0], config), config.memory_mb, config.trust, len(paths))
        self.beside = tuple(open_store(path, config, len(paths)) for path in paths[1:])
        weights, files = config.weights or (1.0,) * len(paths), config.class_maps or ("",) * len(paths)
        _check_length("weights", weights, len(paths))
        _check_length("class_maps", files, len(paths))
        self.average, self.weights = config.average, [weight / sum(weights) for weight in weights]
        self.maps = [_read_map(file, store) for file, store in zip(files, self.stores, strict=True)]
        for store in self.beside:
            _check_inputs(self, store)
        _check_classes(self)
        _check_sampled(self)

    @property
    def with_maps(self) -> list[tuple[Store, ClassMap | None]]:
        return list(zip(self.stores, self.maps, strict=True))

    @property
    def num_classes(self) -> int:
        return self.plan.num_classes if self.maps[0] is None else len(self.maps[0])

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Those of the first teacher that names the student's."""
        named = (_names(store) for store, chosen in self.with_maps if chosen is None)
        return next(filter(None, named), None)

    def rows(self, view: int, sample_ids: NDArray[np.int64]) -> Rows:
        """As `Store`, averaged.

        Raises:
            DamagedError: as `Store`.
            DistillError: nothing is left of a row.
        """
        try:
            parts = [_rows(store, chosen, view, sample_ids) for store, chosen in self.with_maps]
            return parts[0] if len(parts) == 1 else average(parts, self.weights, self.num_classes, self.average)
        except EmptyRow as error:
            raise DistillError(
                f"store {self}: view {view}: {error}; give store.average=probability, or stores with a larger --top-k"
            ) from error

    @property
    def averaging(self) -> dict[str, Any]:
        """`weights` and `average` where there are several stores, the sha256 of `class_maps` where there are any."""
        several = len(self.stores) > 1
        maps = [None if chosen is None else sha256(canonical_json(chosen.tolist())) for chosen in self.maps]
        return {
            "weights": self.weights if several else None,
            "average": self.average if several else None,
            "class_maps": maps if any(maps) else None,
        }


def open_stores(config: StoreConfig) -> Store | None:
    """The store that `train` and `eval` read: one, several as one, or none where none is named.

    Raises:
        as `Ensemble`.
    """
    if config.path is None:
        return None
    if isinstance(config.path, str) and not (config.weights or config.class_maps):
        return open_store(config.path, config)
    return Ensemble((config.path,) if isinstance(config.path, str) else config.path, config)


def identity_of(store: Store | None) -> dict[str, Any]:
    """What a run's attempts must agree in of what taught it: the store's id, or the ids of several, and `averaging`."""
    plain = {"weights": None, "average": None, "class_maps": None}
    averaging = store.averaging if isinstance(store, Ensemble) else plain
    ids = [each.id for each in store.stores] if store else []
    return {"store": ids if len(ids) > 1 else next(iter(ids), None)} | {
        f"store.{name}": value for name, value in averaging.items()
    }


def lineage_of(store: Store | None) -> dict[str, Any]:
    """The same for a card: `teacher` and `store`, those of several with a comma between, and `averaging`."""
    if store is None:
        return {}
    averaging = {name: value for name, value in store.averaging.items() if value} if isinstance(store, Ensemble) else {}
    return {
        "teacher": ", ".join(each.plan.teacher["name"] for each in store.stores),
        "store": ", ".join(each.id for each in store.stores),
        "averaging": averaging or None,
    }


def _rows(store: Store, chosen: ClassMap | None, view: int, sample_ids: NDArray[np.int64]) -> Rows:
    """The rows of one store: of an ensemble, its own."""
    rows = Store.rows(store, view, sample_ids)
    return rows if chosen is None else gather(rows, chosen, store.plan.num_classes)


def _names(store: Store) -> tuple[str, ...] | None:
    names = store.plan.teacher["classes"]
    return names and tuple(names)


def _check_length(name: str, values: Sequence[object], stores: int) -> None:
    if len(values) != stores:
        raise UsageError(f"store.{name}: has {len(values)} values, there are {stores} --store; give one for each")


def _read_map(file: str, store: Store) -> ClassMap | None:
    """
    Raises:
        UsageError: it is no list of class ids, or one is not of the store or there twice.
        MismatchError: it is of more classes than the store has.
    """
    if not file:
        return None
    name, there = f"store.class_maps {file}", store.plan.num_classes
    chosen = np.array(read_class_map(Path(file), "store.class_maps"), np.int64)
    if NEW in chosen:
        raise UsageError(
            f"{name}: says {NEW} of class {chosen.tolist().index(NEW)}: a class that a teacher does not know has no "
            "probability; give a class of the store to each"
        )
    if chosen.max() >= there:
        raise MismatchError(f"{name}: has class {chosen.max()}, store {store} has {there} classes; give ids below that")
    values, times = np.unique(chosen, return_counts=True)
    if times.max() > 1:
        twice = values[times > 1][0]
        first, second = np.flatnonzero(chosen == twice)[:2]
        raise UsageError(
            f"{name}: gives class {twice} of the store to both {first} and {second}; give each class of the store once"
        )
    return chosen


def _check_inputs(first: Store, other: Store) -> None:
    """Refuse a store whose teacher saw other inputs.

    Raises:
        MismatchError: other images, views, draws or pairs, or it lacks rows of others; both values are named.
    """
    for store in (first, other):
        check_replayable(f"store {store}", store.plan.transform)
    advice = "write it with the data, [data] and seed of the first"
    for what, ours, theirs in _inputs(first, other):
        if ours != theirs:
            raise MismatchError(f"store {other}: {what} {theirs}, that of store {first} {ours}; {advice}")
    if other.views != first.views:
        raise MismatchError(
            f"store {other}: has {other.views} views, store {first} {first.views}; bring them to one number by "
            '"distill store extend" or "distill store trim --views"'
        )
    for view, (ours, theirs) in enumerate(zip(first.drawn, other.drawn, strict=True)):
        if ours != theirs:
            raise MismatchError(
                f"store {other}: view {view} is drawn by seed {theirs[0]}, view {theirs[1]}, that of store {first} by "
                f"seed {ours[0]}, view {ours[1]}; {advice}"
            )
    differing = np.setxor1d(first.sample_ids, other.sample_ids)
    if len(differing):
        raise MismatchError(
            f"store {other}: {len(differing)} samples, such as {differing[0]}, have rows in it or in store {first}, "
            "but not in both; write both of the same files"
        )
    if read_view(first.plan.transform).mixes:
        _check_pairs(first, other)


def _inputs(first: Store, other: Store) -> Iterator[tuple[str, Any, Any]]:
    """What must be the same: its name, and its value in both stores."""
    yield "number of images", first.plan.samples, other.plan.samples
    for part in ("keys", "labels"):
        ours, theirs = (store.plan.data[f"{part}_sha256"] for store in (first, other))
        if ours and theirs:
            yield f"{part} fingerprint", ours[:12], theirs[:12]
    ours, theirs = (read_view(store.plan.transform, f"store {store}") for store in (first, other))
    for field in fields(View):
        if field.name not in COLOURS:
            yield f"data.{field.name}", getattr(ours, field.name), getattr(theirs, field.name)


def _check_pairs(first: Store, other: Store) -> None:
    """
    Raises:
        MismatchError: images are mixed with others in the two stores.
    """
    skipped = np.setdiff1d(np.arange(first.plan.samples), first.sample_ids)
    for view in range(first.views):
        ours, theirs = (store.generation_of(view)[0].plan for store in (first, other))
        if ours.dealing != theirs.dealing:
            raise MismatchError(
                f"store {other}: mixes images within shards of {theirs.shard_rows} rows, store {first} of "
                f"{ours.shard_rows}, so that view {view} has other pairs; write it with --shard-rows {ours.shard_rows}"
            )
        if (first.lacks(view, skipped) != other.lacks(view, skipped)).any():
            raise MismatchError(
                f"store {other}: lacks other images of view {view} than store {first}, so that it has other pairs; "
                "write both of the same files"
            )


def _check_classes(ensemble: Ensemble) -> None:
    """
    Raises:
        MismatchError: the stores are of other classes, as their maps leave them.
    """
    first, count, named = ensemble.stores[0], ensemble.num_classes, list[tuple[Store, tuple[str, ...]]]()
    for store, chosen in ensemble.with_maps:
        given = store.plan.num_classes if chosen is None else len(chosen)
        if given != count:
            raise MismatchError(f"store {store}: gives {given} classes, store {first} {count}; give store.class_maps")
        if chosen is None and (names := _names(store)):
            named.append((store, names))
    for store, names in named[1:]:
        for place, (ours, theirs) in enumerate(zip(named[0][1], names, strict=True)):
            if ours != theirs:
                raise MismatchError(
                    f'store {store}: class {place} is "{theirs}", that of store {named[0][0]} "{ours}"; '
                    "give store.class_maps"
                )


def _check_sampled(ensemble: Ensemble) -> None:
    """
    Raises:
        MismatchError: sampled rows are to be what they cannot be.
    """
    for store, chosen in ensemble.with_maps:
        if store.sampled and ensemble.average == "log" and ensemble.beside:
            raise MismatchError(
                f"store.average: log asked, the rows of store {store} are sampled, and the logs of draws have another "
                "mean; give store.average=probability, or a store without --sample"
            )
        if store.sampled and chosen is not None:
            raise MismatchError(
                f"store.class_maps: the rows of store {store} are sampled, and their share of some classes is biased; "
                "give a store without --sample"
            )
