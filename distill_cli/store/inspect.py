"""What a store is and holds, complete or not: identity from its plans, sizes from its manifests, and what rows are
like from a few shards."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.files import sha256_file
from distill_cli.locks import holder_of
from distill_cli.report import Report
from distill_cli.store.codecs import CODECS
from distill_cli.store.inventory import Inventory, Piece, take_inventory
from distill_cli.store.manifest import Manifest, ShardEntry, read_manifest
from distill_cli.store.place import Folder, Place
from distill_cli.store.plan import Generation, Plan, read_generations, store_id
from distill_cli.store.rows import Taken
from distill_cli.store.shard import HEADER_BYTES, Shard, check_rows, open_shard, read_header

ENDS, ALL = 0, -1
"""Shards to read, besides a number: first, middle and last of the first and last view; every one."""
KS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
PERCENTILES = (1, 10, 50, 90, 99)
BINS = 100_000
"""Of a mass, for its percentiles: memory does not grow with the rows."""
MOST_NAMED = 1000
SHOWN = 10
"""Missing shards and classes in the tables."""
DECODED_ROWS = 8192

ORDERS = {"dealt": "samples dealt to them", "tars": "each the samples of a tar"}

UNKNOWN = ""
"""The sha256 of a shard that no manifest has yet: only a folder is asked for those."""


@dataclass(frozen=True)
class Views:
    """One generation of views."""

    plan: str
    plan_sha256: str
    views: int
    first_view: int
    seed: int
    state: str
    """`complete` or `unfinished`."""
    shards: int
    shards_there: int | None
    """None where the store lies at a URL and cannot be listed."""
    rows: int
    """Of the shards that are there."""
    bytes: int
    skipped: int
    top1: float | None
    """The teacher's accuracy on these rows, in percent."""
    top5: float | None
    missing: tuple[str, ...]
    """At most 1,000 of them."""


@dataclass(frozen=True)
class Mass:
    """The share of a row's mass that its first k classes hold, over the rows that were read."""

    k: int
    mean: float
    percentiles: dict[str, float]


@dataclass(frozen=True)
class Entries:
    """How many classes a row keeps, where that differs."""

    mean: float
    percentiles: dict[str, int]


@dataclass(frozen=True)
class First:
    """How often a class is a row's first."""

    class_id: int
    name: str
    rows: int
    share: float
    """In percent."""


@dataclass(frozen=True)
class Inspection:
    """What a store is and holds."""

    store: str
    store_id: str
    """Of its complete plans, which are what a reader reads; of its first while none is."""
    format: str
    version: int
    state: str
    """`complete`; `unfinished`; or `extending`, where the first plans are complete."""
    writer: str | None
    """Who is at work there."""
    teacher: dict[str, Any]
    data: dict[str, Any]
    transform: dict[str, Any]
    software: dict[str, str]
    lineage: dict[str, Any] | None
    samples: int
    views: int
    rows: int
    skipped: int
    shards: int
    shards_there: int | None
    bytes: int
    bytes_per_row: float
    top_k: int
    keep_mass: float | None
    min_k: int
    sample: int
    codec: str
    bits: int | None
    shard_rows: int
    """Of the largest shard."""
    order: str
    """Of the samples: `dealt` to shards, or `tars`: a shard for each."""
    precision: str
    top1: float | None
    top5: float | None
    generations: tuple[Views, ...]
    shards_read: int
    rows_read: int
    damaged: dict[str, str]
    """Shards that could not be read, and why."""
    mass: tuple[Mass, ...]
    entries: Entries | None
    first: tuple[First, ...]
    """The most frequent before the others."""
    never_first: int
    """Classes that are first of no row that was read."""


def inspect(place: Place, shards: int = ENDS, report: Report | None = None) -> Inspection:
    """Look into a store.

    Args:
        shards: how many to read, evenly over all views; or `ENDS`, `ALL`.

    Raises:
        DamagedError: there is no store, or a plan or a manifest is damaged.
        MismatchError: it is of another format version.
    """
    report = report or Report()
    generations = read_generations(place)
    manifests = [read_manifest(place, generation) for generation in generations]
    inventory = take_inventory(place.path, generations) if isinstance(place, Folder) else None
    views = [_views(place, *each, inventory) for each in zip(generations, manifests, strict=True)]
    plan, complete = generations[0].plan, [each.state == "complete" for each in views]
    rows, size = sum(each.rows for each in views), sum(each.bytes for each in views)
    sampled = _Sampled()
    chosen = _choose(generations, manifests, inventory, shards)
    with report.progress("inspect", len(chosen), unit="shards") as progress:
        for generation, piece, entry in chosen:
            _read(place, generation, piece, entry, sampled)
            progress.advance(1)
    there = [each.shards_there for each in views]
    counted = [each for each in views if each.rows]
    return Inspection(
        store=str(place),
        store_id=store_id([each.plan for each, done in zip(generations, complete, strict=True) if done] or [plan]),
        format=plan.format,
        version=plan.version,
        state="complete" if all(complete) else "extending" if complete[0] else "unfinished",
        writer=holder_of(place.path) if isinstance(place, Folder) else None,
        teacher=dict(plan.teacher),
        data=dict(plan.data),
        transform=dict(plan.transform),
        software=dict(plan.software),
        lineage=None if plan.lineage is None else dict(plan.lineage),
        samples=plan.samples,
        views=sum(each.views for each in views),
        rows=rows,
        skipped=len({sample_id for manifest in manifests if manifest for sample_id in manifest.skipped}),
        shards=sum(each.shards for each in views),
        shards_there=None if None in there else sum(each or 0 for each in there),
        bytes=size,
        bytes_per_row=round(size / max(1, rows), 1),
        top_k=plan.top_k,
        keep_mass=plan.keep_mass,
        min_k=plan.min_k,
        sample=plan.sample,
        codec=plan.codec,
        bits=plan.bits,
        shard_rows=plan.shard_rows,
        order="dealt" if plan.shard_sizes is None else "tars",
        precision=plan.precision,
        top1=_mean([(each.top1, each.rows) for each in counted]),
        top5=_mean([(each.top5, each.rows) for each in counted]),
        generations=tuple(views),
        shards_read=sampled.shards,
        rows_read=sampled.rows,
        damaged=sampled.damaged,
        mass=sampled.masses(),
        entries=sampled.entries(),
        first=sampled.firsts(plan.teacher["classes"]),
        never_first=plan.num_classes - len(sampled.first) if sampled.rows else 0,
    )


def tables(found: Inspection) -> Iterator[tuple[tuple[str, ...], list[tuple[Any, ...]]]]:
    """(head, rows) of what a person reads."""
    yield ("", ""), list(_identity(found))
    head = ("plan", "views", "drawn as", "seed", "state", "shards", "rows", "skipped", "top1", "top5")
    yield head, [
        (
            each.plan, each.views, f"{each.first_view} to {each.first_view + each.views - 1}", str(each.seed),
            each.state, f"{each.shards if each.shards_there is None else each.shards_there:,} of {each.shards:,}",
            each.rows, each.skipped, each.top1, each.top5,
        )
        for each in found.generations
    ]  # fmt: skip
    if missing := [path for each in found.generations for path in each.missing]:
        more = found.shards - (found.shards_there or 0) - SHOWN
        yield ("missing",), [(path,) for path in missing[:SHOWN]] + ([(f"and {more:,} more",)] if more > 0 else [])
    if found.damaged:
        yield ("damaged", ""), list(found.damaged.items())
    if found.mass:
        yield (
            ("mass of the first", "mean", *(f"{each} %" for each in PERCENTILES)),
            [(each.k, *(f"{value:.5f}" for value in (each.mean, *each.percentiles.values()))) for each in found.mass],
        )
    if found.entries:
        yield (
            ("", "mean", *(f"{each} %" for each in PERCENTILES)),
            [("classes a row", f"{found.entries.mean:.2f}", *found.entries.percentiles.values())],
        )
    if found.first:
        yield (
            ("first class", "id", "rows", "%"),
            [(each.name, str(each.class_id), each.rows, f"{each.share:.2f}") for each in found.first[:SHOWN]],
        )


def _identity(found: Inspection) -> Iterator[tuple[str, Any]]:
    teacher = found.teacher
    yield "store", found.store
    yield "store id", found.store_id
    yield "format", f"{found.format} {found.version}"
    yield "state", found.state + (f", {found.writer} is writing" if found.writer else "")
    yield "teacher", f"{teacher['name']}, weights {teacher['weights_sha256'][:12]}, {teacher['num_classes']:,} classes"
    yield "teacher top1, top5", f"{_percent(found.top1)}, {_percent(found.top5)}"
    labels = found.data["labels_sha256"]
    yield "data", f"{found.samples:,} samples, keys {found.data['keys_sha256'][:12]}, labels {labels and labels[:12]}"
    yield "transform", _short(found.transform)
    kept = f"the first {found.top_k:,} classes"
    if found.keep_mass is not None:
        kept = f"the first classes up to mass {found.keep_mass:g}, {found.min_k:,} to {found.top_k:,} of them"
    yield "a row keeps", kept + (f" and {found.sample:,} draws from the others" if found.sample else "")
    yield "codec", found.codec + ("" if found.bits is None else f", {found.bits} bits")
    yield "precision", found.precision
    yield "views", found.views
    yield "rows", found.rows
    yield "skipped samples", found.skipped
    yield "bytes", found.bytes
    yield "bytes a row", found.bytes_per_row
    yield "shards", f"{found.shards:,} of up to {found.shard_rows:,} rows, {ORDERS[found.order]}"
    yield "made from", None if found.lineage is None else _short(found.lineage)
    yield "software", _short(found.software)
    yield "read for what follows", f"{found.rows_read:,} rows of {found.shards_read:,} shards"
    if found.rows_read:
        yield "classes never first", f"{found.never_first:,} of {teacher['num_classes']:,}"


def _short(values: Mapping[str, Any]) -> str:
    """`name value; name value`, without what has no value."""
    texts = {name: value for name, value in values.items() if value not in ("", None)}
    lists = {name: ", ".join(map(_number, value)) for name, value in texts.items() if isinstance(value, list)}
    return "; ".join(f"{name} {lists.get(name) or value}" for name, value in texts.items())


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _mean(parts: Sequence[tuple[float | None, int]]) -> float | None:
    """The mean of percentages over rows; None where one is not known."""
    if not parts or any(value is None for value, _ in parts):
        return None
    return round(sum((value or 0) * rows for value, rows in parts) / sum(rows for _, rows in parts), 3)


def _views(place: Place, generation: Generation, manifest: Manifest | None, inventory: Inventory | None) -> Views:
    plan, missing = generation.plan, tuple[str, ...]()
    rows, size, top1, top5 = 0, 0, None, None
    total = there = plan.views * plan.shards
    if inventory is not None:
        there = len(inventory.shards[generation.number])
        pieces = (piece for piece, _ in zip(inventory.missing(generation), range(MOST_NAMED), strict=False))
        missing = tuple(generation.path(*piece) for piece in pieces)
    if manifest is not None:
        rows, size, top1, top5 = manifest.rows, manifest.bytes, manifest.top1, manifest.top5
    elif inventory is not None:
        rows, size, top1, top5 = _so_far(place, generation, inventory.shards[generation.number])
    return Views(
        plan=generation.plan_name,
        plan_sha256=plan.sha256,
        views=plan.views,
        first_view=plan.first_view,
        seed=plan.seed,
        state="complete" if manifest else "unfinished",
        shards=total,
        shards_there=None if inventory is None else there,
        rows=rows,
        bytes=size,
        skipped=len(manifest.skipped) if manifest else 0,
        top1=top1,
        top5=top5,
        missing=missing,
    )


def _so_far(place: Place, generation: Generation, pieces: set[Piece]) -> tuple[int, int, float | None, float | None]:
    """Rows, bytes, top1 and top5 by the first lines of the shards of an unfinished generation."""
    rows = size = 0
    hits: list[list[int | None]] = [[], []]
    for piece in sorted(pieces):
        path = place.file(generation.path(*piece), UNKNOWN)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                header = read_header(path, file.read(HEADER_BYTES) or b"")
                size += os.fstat(file.fileno()).st_size
        except (DamagedError, MismatchError, OSError):
            # Said of those that are read; "store verify" names them all.
            continue
        rows += header.rows
        hits[0].append(header.top1)
        hits[1].append(header.top5)
    shares = [_share(counts, rows) for counts in hits]
    return rows, size, shares[0], shares[1]


def _share(hits: Sequence[int | None], rows: int) -> float | None:
    counted = [count for count in hits if count is not None]
    return round(100 * sum(counted) / rows, 3) if rows and len(counted) == len(hits) else None


def _choose(
    generations: Sequence[Generation],
    manifests: Sequence[Manifest | None],
    inventory: Inventory | None,
    shards: int,
) -> list[tuple[Generation, Piece, ShardEntry | None]]:
    """The shards to read, with what the manifest says of each."""
    there: list[tuple[Generation, Piece, ShardEntry | None]] = []
    for generation, manifest in zip(generations, manifests, strict=True):
        if manifest is not None:
            named = zip(generation.plan.every_shard(), manifest.shards, strict=True)
            present = None if inventory is None else inventory.shards[generation.number]
            there += [(generation, piece, entry) for piece, entry in named if present is None or piece in present]
        elif inventory is not None:
            there += [(generation, piece, None) for piece in sorted(inventory.shards[generation.number])]
    if shards == ALL or not there:
        return there
    if shards == ENDS:
        view_of = [each[0].offset + each[1][0] for each in there]
        first = [place for place, view in enumerate(view_of) if view == view_of[0]]
        last = [place for place, view in enumerate(view_of) if view == view_of[-1]]
        return [there[at] for at in sorted({part[i] for part in (first, last) for i in (0, len(part) // 2, -1)})]
    return [there[at] for at in sorted({round(at) for at in np.linspace(0, len(there) - 1, shards)})]


@dataclass
class _Sampled:
    """Sums over the rows that were read."""

    rows: int = 0
    shards: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    ks: tuple[int, ...] = ()
    mass_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    mass_bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """`[k, bins]`: rows by the mass that their first k classes hold."""
    counts: NDArray[np.int64] | None = None
    """Rows by their entries."""
    first: Counter[int] = field(default_factory=Counter)

    def add(self, taken: Taken, plan: Plan) -> None:
        class_id, log_prob, log_tail, count = taken
        if not self.ks and plan.top_k:
            self.ks = (*(k for k in KS if k < plan.top_k), plan.top_k)
            self.mass_sum = np.zeros(len(self.ks))
            self.mass_bins = np.zeros((len(self.ks), BINS + 1), np.int64)
        self.rows += len(class_id)
        prob = np.exp(log_prob.astype(np.float64))
        # Rounded values sum to a little more or less than one.
        total = prob.sum(axis=1) + np.exp(log_tail.astype(np.float64))
        held = prob.cumsum(axis=1)[:, [k - 1 for k in self.ks]] / total[:, None]
        self.mass_sum += held.sum(axis=0)
        for place, bins in enumerate((held * BINS).round().astype(np.int64).T):
            self.mass_bins[place] += np.bincount(bins, minlength=BINS + 1)
        if count is not None:
            rows_by_entries = np.bincount(count, minlength=plan.form.width + 1)
            self.counts = rows_by_entries if self.counts is None else self.counts + rows_by_entries
        names, rows = np.unique(class_id[:, 0], return_counts=True)
        self.first.update(dict(zip(names.tolist(), rows.tolist(), strict=True)))

    def masses(self) -> tuple[Mass, ...]:
        return tuple(
            Mass(k, round(float(total) / self.rows, 6), {str(q): at / BINS for q, at in _percentiles(bins).items()})
            for k, total, bins in zip(self.ks, self.mass_sum, self.mass_bins, strict=True)
        )

    def entries(self) -> Entries | None:
        if self.counts is None:
            return None
        mean = float((self.counts * np.arange(len(self.counts))).sum() / self.rows)
        return Entries(round(mean, 3), {str(q): at for q, at in _percentiles(self.counts).items()})

    def firsts(self, classes: Sequence[str] | None) -> tuple[First, ...]:
        ordered = sorted(self.first.items(), key=lambda item: (-item[1], item[0]))
        return tuple(
            First(
                each,
                classes[each] if classes and each < len(classes) else str(each),
                rows,
                round(100 * rows / self.rows, 4),
            )
            for each, rows in ordered
        )


def _percentiles(bins: NDArray[np.int64]) -> dict[int, int]:
    """The number that so many percent of the rows do not exceed, rows being counted by number."""
    below = bins.cumsum()
    return {q: int(np.searchsorted(below, below[-1] * q / 100)) for q in PERCENTILES}


def _read(place: Place, generation: Generation, piece: Piece, entry: ShardEntry | None, sampled: _Sampled) -> None:
    """Add the rows of a shard, or why it has none."""
    plan, name = generation.plan, generation.path(*piece)
    try:
        shard = _open(place, generation, piece, entry)
        for start in range(0, len(shard), DECODED_ROWS):
            at = np.arange(start, min(start + DECODED_ROWS, len(shard)))
            sampled.add(CODECS[plan.codec].take([(shard.rows, at)], plan.form), plan)
        sampled.shards += 1
    except (DamagedError, MismatchError, ValueError, OSError) as error:
        sampled.damaged[name] = str(error).removeprefix(f"{place}/{name}: ")


def _open(place: Place, generation: Generation, piece: Piece, entry: ShardEntry | None) -> Shard:
    """
    Raises:
        DamagedError, MismatchError, OSError: it is not what it must be.
    """
    path = place.file(generation.path(*piece), entry.sha256 if entry else UNKNOWN)
    shard = open_shard(path, generation.plan, *piece)
    if entry is not None and sha256_file(path) != entry.sha256:
        raise DamagedError(f"{path}: its sha256 is not the manifest's")
    check_rows(path, shard, generation.plan, piece[1])
    return shard
