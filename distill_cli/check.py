"""`distill store check`: run the teacher again on some rows of a store, and compare.

(TinyViT's own check prints two running means; it has no threshold and no exit code, and leaves out the last batch.)
"""

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from distill_cli.capture import Capture, CaptureOrder, logits_of, rows_of
from distill_cli.data import open_train
from distill_cli.data.batch import Batch
from distill_cli.data.batches import Batches
from distill_cli.data.image_cache import cached
from distill_cli.data.images import printable
from distill_cli.data.loader import load
from distill_cli.data.sources import Source
from distill_cli.data.views import check_decoder, stored_view, train_transform
from distill_cli.distributed import Signals, World, stopped
from distill_cli.errors import MismatchError
from distill_cli.randomness import derive
from distill_cli.recipe import Recipe
from distill_cli.replay import check_data, prove_shard, stored_partners
from distill_cli.report import Report
from distill_cli.store import open_store
from distill_cli.store.compare import Compared, compare
from distill_cli.store.plan import Generation
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.students.build import check_forward
from distill_cli.teachers import Frozen, load_frozen

ROWS = 2000
TOLERANCE = {"fp32": 0.02, "bf16": 0.2}
"""Nats, by the precision of the capture: another GPU sums in another order, and bf16 has 8 bits of a logit."""
SAME_DRAWS = 95.0
"""Percent of the drawn mass."""


@dataclass(frozen=True)
class Summary:
    """What was measured; differences in nats, over probabilities of at least 1e-4."""

    status: str
    """`ok`, or `differs`: beyond the tolerance."""
    store: str
    teacher: str
    rows: int
    batches: int
    shards: int
    probes: int
    """Inputs that replay to the checksums in the shards."""
    tolerance: float
    max_difference: float
    """Of stored and fresh log-probabilities of the same class."""
    mean_difference: float
    codec_difference: float
    """What the codec itself moves a value by, at most; it is granted beside the tolerance."""
    identical: float
    """Percent of the rows, in every bit."""
    other_classes: float
    """Percent of the rows that keep other classes than the fresh ones …"""
    other_classes_beyond_ties: float
    """… for which probabilities within the tolerance are no excuse."""
    same_draws: float | None
    """Percent of the drawn mass, where rows are sampled."""
    rows_beyond: int
    """The tolerance."""
    worst: str | None
    """A row beyond the tolerance."""
    skipped: int
    """Images that could not be decoded, and were not compared."""
    images_per_s: float
    wall_s: float


def check(
    recipe: Recipe,
    world: World,
    report: Report | None = None,
    rows: int = ROWS,
    tolerance: float | None = None,
    seed: int = 0,
) -> Summary:
    """Replay some inputs of the store `recipe.store.path`, run `recipe.teacher` on them, and compare.

    Whole batches are taken, of `recipe.store.batch_size` images as the capture had them: the first of the first shard
    and the last of the last shard of each generation, and others at random.

    Args:
        rows: to compare, at least.
        tolerance: in nats; by default 0.02, and 0.2 where the teacher ran in bf16. See `store/compare.py`.
        seed: of the choice.

    Raises:
        MismatchError: the store is of another teacher, other data or other pixels, or was imported.
        DamagedError: the store is incomplete or damaged.
        UsageError: no teacher or no data are named.
        Stopped: a signal came.
    """
    report, start = report or Report(), time.monotonic()
    assert isinstance(recipe.store.path, str), "the command names a store"
    store = open_store(recipe.store.path, recipe.store)
    _refuse_imported(store)
    tolerance = TOLERANCE[store.plan.precision] if tolerance is None else tolerance
    captures = _open(recipe, store, world, report)
    source = captures[0].source
    sums = _Sums()
    ready = time.monotonic()
    for capture, generation in zip(captures, store.generations, strict=True):
        captured = CaptureOrder.of(capture.plan, capture.view, recipe.store.batch_size)
        chosen = choose(generation, captured.batch_size, -(-rows // len(captures)), seed)
        order = _order(store, generation, captured, chosen)
        sums.probes += _prove(store, generation, capture, order, report)
        _compare(store, generation, capture, order, world, tolerance, sums, report)
    wall_s = time.monotonic() - start
    return sums.summary(store, source, captures[0].teacher, tolerance, time.monotonic() - ready, wall_s)


def check_passed(summary: Summary) -> None:
    """
    Raises:
        MismatchError: rows differ beyond the tolerance.
    """
    if summary.status == "ok":
        return
    advice = "the store is not what this teacher says of these images; write it anew, or give a --tolerance"
    if not summary.rows_beyond:
        raise MismatchError(
            f"store {summary.store}: {summary.same_draws:.2f} % of the drawn mass is the same, at least "
            f"{SAME_DRAWS:.0f} % asked; {advice}"
        )
    raise MismatchError(
        f"store {summary.store}: {summary.rows_beyond:,} of {summary.rows:,} rows differ beyond the tolerance of "
        f"{summary.tolerance:g} nats, as {summary.worst}; {advice}"
    )


def choose(generation: Generation, batch_size: int, rows: int, seed: int) -> list[int]:
    """The numbers of the batches to compare, as `CaptureOrder` counts them; ascending.

    The first and the last of all are among them, and as many others, drawn by `seed`, as make `rows` rows.
    """
    plan = generation.plan
    order = CaptureOrder(plan.dealing, batch_size)
    ends = np.cumsum([order.batches((0, shard)) for shard in range(plan.shards)])
    of_a_view = int(ends[-1])
    total = plan.views * of_a_view

    def number(place: int) -> int:
        view, within = divmod(place, of_a_view)
        shard = int(np.searchsorted(ends, within, side="right"))
        return order.numbers((view, shard)).stop - int(ends[shard]) + within

    # Twice as many as are needed on average; where they are not enough, in order.
    wanted = min(total, 2 + -(-rows * of_a_view // plan.samples) * 2)
    drawn = random.Random(derive("check", seed, generation.number)).sample(range(total), wanted)
    found, count = set[int](), 0
    for place in itertools.chain((0, total - 1), drawn, range(total)):
        if count >= rows and len(found) >= min(2, total):
            break
        if place not in found:
            found.add(place)
            count += len(order(number(place))[1])
    return sorted(map(number, found))


def _refuse_imported(store: Store) -> None:
    for generation in store.generations:
        lineage = generation.plan.lineage or {}
        if "import" in str(lineage.get("command")) or generation.plan.transform.get("augment") == "tinyvit":
            raise MismatchError(
                f"store {store}: was imported, and what its teacher saw cannot be replayed here; "
                'check it where it was written ("distill store verify" checks its bytes)'
            )


def _open(recipe: Recipe, store: Store, world: World, report: Report) -> list[Capture]:
    """What each generation was captured by.

    Raises:
        MismatchError: the teacher, the data or their view are not the store's; both sides are named.
    """
    report.stage("opening the data")
    source = open_train(recipe.data, report)
    check_data(store, source)
    report.stage(f"{len(source)} images; loading the teacher")
    teacher = load_frozen(recipe.teacher)
    ours, theirs = store.plan.teacher["weights_sha256"], teacher.weights_sha256
    if ours != theirs:
        raise MismatchError(
            f"store {store}: is of teacher {store.plan.teacher['name']} with weights {ours[:12]}, --teacher "
            f"{recipe.teacher.name} is {teacher.name} with weights {theirs[:12]}; give the teacher of the store"
        )
    view = stored_view(recipe.data, store.plan.transform, f"store {store}")
    check_decoder(view, world.device, store)
    teacher.model.to(world.device)
    check_forward(teacher.model, f"teacher {teacher.name}", view.image_size)
    source = cached(source, recipe.data, "train", view, world, report)
    return [Capture(recipe, {}, teacher, source, view, generation.plan) for generation in store.generations]


@dataclass(frozen=True)
class _Order:
    """Batch number -> (view, sample ids), from a list; a class, so that it pickles into spawned workers."""

    batches: tuple[tuple[int, NDArray[np.int64]], ...]
    pieces: tuple[tuple[int, int], ...]
    """(view, shard) of each."""

    def __call__(self, number: int) -> tuple[int, NDArray[np.int64]]:
        return self.batches[number]


def _order(store: Store, generation: Generation, order: CaptureOrder, numbers: Sequence[int]) -> _Order:
    """The chosen batches, without the samples that the capture skipped."""
    plan = generation.plan
    batches, pieces = [], []
    for number in numbers:
        view, ids = order(number)
        _, shard = order.piece(number)
        skipped = plan.dealing.sample_ids(shard)[store.shard(generation.offset + view, shard).skipped]
        batches.append((view, ids[~np.isin(ids, skipped)]))
        pieces.append((view, shard))
    return _Order(tuple(batches), tuple(pieces))


def _prove(store: Store, generation: Generation, capture: Capture, order: _Order, report: Report) -> int:
    """Replay the probes of every shard that rows are taken from."""
    pieces = sorted(set(order.pieces))
    transform = train_transform(capture.view)
    report.stage(f"replaying the first inputs of {len(pieces)} shards")
    return sum(prove_shard(store, generation.offset + view, shard, capture.source, transform) for view, shard in pieces)


def _compare(
    store: Store,
    generation: Generation,
    capture: Capture,
    order: _Order,
    world: World,
    tolerance: float,
    sums: "_Sums",
    report: Report,
) -> None:
    total = sum(len(ids) for _, ids in order.batches)
    sums.shards += len(set(order.pieces))
    report.stage(f"comparing {total} rows of {generation.plan_name} with the teacher")
    with Signals() as signals, report.progress("check", total) as progress:
        for batch in _batches(store, generation, capture, order, world):
            sums.skipped += len(batch.skipped)
            if len(batch):
                view = generation.offset + batch.view
                sums.add(view, _one(store, view, capture, batch, world, tolerance), batch.sample_ids)
            progress.advance(len(batch) + len(batch.skipped))
            if signals.received:
                raise stopped(signals.received, f"{store}: was not checked to the end; nothing was written")


def _batches(store: Store, generation: Generation, capture: Capture, order: _Order, world: World) -> Iterator[Batch]:
    batches = Batches(
        capture.source,
        train_transform(capture.view),
        order,
        drawn=capture.plan.drawn,
        skip_unreadable=capture.recipe.data.skip_unreadable,
        partners=stored_partners(store, capture.view, generation.offset),
    )
    return load(batches, range(len(order.batches)), world.workers, world.device)


def _one(store: Store, view: int, capture: Capture, batch: Batch, world: World, tolerance: float) -> Compared:
    with torch.inference_mode():
        logits = logits_of(capture, batch, world)
        sparse = rows_of(capture.plan, logits, batch)
        log_prob = logits.log_softmax(dim=-1).cpu().numpy()
    class_id, kept, log_tail, count = (
        part.cpu().numpy() for part in (sparse.class_id, sparse.log_prob, sparse.log_tail, sparse.counts)
    )
    fresh = Rows(batch.sample_ids, class_id, kept, log_tail, count if capture.plan.form.ragged else None)
    return compare(capture.plan, store.rows(view, batch.sample_ids), fresh, log_prob, tolerance)


@dataclass
class _Sums:
    """Over all batches."""

    rows: int = 0
    batches: int = 0
    shards: int = 0
    probes: int = 0
    skipped: int = 0
    total: float = 0
    entries: int = 0
    largest: float = 0
    codec: float = 0
    identical: int = 0
    other_classes: int = 0
    beyond_ties: int = 0
    rows_beyond: int = 0
    same_draws: float = 0
    draws: float = 0
    worst: tuple[float, int, int, list[str]] = field(default_factory=lambda: (-1.0, 0, 0, []))
    """Its difference, view, sample and causes."""

    def add(self, view: int, found: Compared, sample_ids: NDArray[np.int64]) -> None:
        self.rows += len(sample_ids)
        self.batches += 1
        self.total += found.total
        self.entries += found.entries
        self.largest = max(self.largest, float(found.largest.max()))
        self.codec = max(self.codec, float(found.codec.max()))
        self.identical += int(found.identical.sum())
        self.other_classes += int(found.other_classes.sum())
        self.beyond_ties += int((found.beyond["classes"] | (found.beyond["values"] & found.other_classes)).sum())
        self.same_draws += found.same_draws
        self.draws += found.draws
        beyond = np.logical_or.reduce(list(found.beyond.values()))
        self.rows_beyond += int(beyond.sum())
        if beyond.any():
            at = int(np.where(beyond, found.largest, -1).argmax())
            causes = [cause for cause, rows in found.beyond.items() if rows[at]]
            self.worst = max(self.worst, (float(found.largest[at]), view, int(sample_ids[at]), causes))

    def summary(
        self, store: Store, source: Source, teacher: Frozen, tolerance: float, compared_s: float, wall_s: float
    ) -> Summary:
        same_draws = round(100 * self.same_draws / self.draws, 3) if self.draws else None
        passed = not self.rows_beyond and (same_draws is None or same_draws >= SAME_DRAWS)
        difference, view, sample_id, causes = self.worst
        worst = f"view {view} of {printable(source.keys[sample_id])} ({', '.join(causes)}; by {difference:.3g})"
        share = lambda count: round(100 * count / max(1, self.rows), 3)  # noqa: E731
        return Summary(
            status="ok" if passed else "differs",
            store=str(store),
            teacher=teacher.name,
            rows=self.rows,
            batches=self.batches,
            shards=self.shards,
            probes=self.probes,
            tolerance=tolerance,
            max_difference=round(self.largest, 6),
            mean_difference=round(self.total / max(1, self.entries), 8),
            codec_difference=round(self.codec, 6),
            identical=share(self.identical),
            other_classes=share(self.other_classes),
            other_classes_beyond_ties=share(self.beyond_ties),
            same_draws=same_draws,
            rows_beyond=self.rows_beyond,
            worst=worst if self.rows_beyond else None,
            skipped=self.skipped,
            images_per_s=round(self.rows / max(compared_s, 1e-3), 1),
            wall_s=round(wall_s, 2),
        )
