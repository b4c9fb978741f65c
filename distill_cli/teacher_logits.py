"""`distill teacher-logits`: write a store of a teacher's sparse logits over the views of some images."""

import bisect
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distill_cli.capture import Capture, CaptureOrder, Piece, Taught, batches_of, fill, join, open_capture, teach
from distill_cli.data import image_cache
from distill_cli.distributed import World
from distill_cli.errors import UsageError
from distill_cli.files import check_ours, free_bytes
from distill_cli.locks import shared
from distill_cli.recipe import Recipe
from distill_cli.report import Report
from distill_cli.store.manifest import Manifest, ShardEntry
from distill_cli.store.plan import PROBES, Generation, Plan, numbered
from distill_cli.store.rows import Rows, at, trim
from distill_cli.store.shard import CONTENT_CRC, encode, open_shard
from distill_cli.store.writer import StoreWriter, check_plan

MARKS = (numbered("plan", 0), numbered("manifest", 0))
BILL_BATCHES = 6
"""Batches that a dry run times."""


@dataclass(frozen=True)
class Summary:
    status: str
    """`done`; `already_done`; or `part`, where others have shards still to write."""
    store: str
    rows: int
    """Of the store; of the shards asked for, where the status is `part`."""
    views: int
    shards: int
    bytes: int
    bytes_per_row: float
    top1: float | None
    """The teacher's own accuracy on the rows, in percent; None without labels."""
    top5: float | None
    images_per_s: float | None
    """Of this process."""
    wall_s: float
    skipped: int
    store_id: str


@dataclass(frozen=True)
class Bill:
    """What `--dry-run` says the store will cost."""

    recipe: Recipe
    origins: dict[str, str]
    """Of the values that the data and the teacher decide."""
    rows: int
    shards: int
    bytes: int
    bytes_per_row: float
    images_per_s: float
    hours: float
    free_bytes: int
    mass: float
    """Mean mass of the classes that a row keeps."""
    half_top_k: int | None
    """`--top-k` with half the bytes; None where no k has."""
    half_top_k_mass: float | None
    half_views: int | None
    """`--views` with half the bytes and half the hours; None where there is only one."""
    cache_bytes: int | None
    """What `--cache` will take besides; the hours are without it."""
    cache_free_bytes: int | None


def teacher_logits(
    recipe: Recipe, out: Path, world: World, report: Report | None = None, shards: tuple[int, int] | None = None
) -> Summary:
    """Write the store of `recipe.teacher` over `recipe.data` to `out`, or what is missing of it.

    Ranks of torchrun and other processes with the same recipe and `out` share the work.

    Args:
        shards: first and one past the last of the shards to write, counted through all views; the others are left to
            others.

    Raises:
        UsageError, MismatchError: teacher, data and settings do not fit, or `out` holds something else.
        DistillError: an image cannot be decoded, or the teacher's output is not finite.
        BusyError: a process that needs the store for itself works there.
        Stopped: a signal came; the finished shards stay.
    """
    report = report or Report()
    start = time.monotonic()
    check_ours(out, MARKS, "store")
    capture = open_capture(recipe, world, report)
    return write_generation(capture, Generation(0, capture.plan), out, world, report, start, shards)


def write_generation(
    capture: Capture,
    generation: Generation,
    out: Path,
    world: World,
    report: Report,
    start: float,
    shards: tuple[int, int] | None = None,
) -> Summary:
    """Write one generation of a store, or what is missing of it; see `teacher_logits`."""
    plan = generation.plan
    pieces = list(plan.every_shard())
    mine = _part(pieces, shards)
    manifest = check_plan(out, generation)
    if manifest is not None:
        report.stage(f"{out}: complete already, {manifest.rows} rows")
        return _summary("already_done", out, plan, manifest, None, time.monotonic() - start)
    source = image_cache.cached(capture.source, capture.recipe.data, "train", capture.view, world, report)
    capture = replace(capture, source=source)
    with shared(out, without_locks=shards is not None) as claims:
        with claims.desk():
            writer = StoreWriter(out, generation, capture.source.labels)
        captured = fill(capture, writer, claims, mine, world, report)
        with claims.desk():
            # Another process may have come here first.
            manifest = check_plan(out, generation)
            if manifest is None and all(writer.is_there(*piece) for piece in pieces):
                report.stage(f"{out}: all {len(pieces)} shards are there; writing the manifest")
                manifest = writer.finish()
    wall_s = time.monotonic() - start
    if manifest is None:
        report.stage(f"{out}: shards {shards} are there; the others are still to be written")
        present = [open_shard(out / generation.path(*piece), plan, *piece) for piece in mine]
        part = Manifest(plan.sha256, tuple(ShardEntry("", len(shard), shard.size, "") for shard in present))
        return _summary("part", out, plan, part, captured / wall_s, wall_s)
    own = "" if manifest.top1 is None else f"; the teacher's own top1 on them is {manifest.top1:.2f}"
    report.stage(f"{out}: {manifest.rows} rows, {manifest.bytes} bytes{own}")
    if manifest.skipped:
        report.warn(f"{out}: {len(manifest.skipped)} images could not be decoded and have no rows")
    return _summary("done", out, plan, manifest, captured / wall_s, wall_s)


def bill(recipe: Recipe, out: Path, world: World, report: Report | None = None) -> Bill:
    """What the store would cost, from a few batches of the real thing; writes nothing.

    Raises:
        as `teacher_logits`.
    """
    report = report or Report()
    check_ours(out, MARKS, "store")
    capture = open_capture(recipe, world, report)
    check_plan(out, Generation(0, capture.plan))
    plan = capture.plan
    order = CaptureOrder.of(plan, capture.view, recipe.store.batch_size)
    numbers = (number for piece in plan.every_shard() for number in order.numbers(piece))
    report.stage("timing a few batches")
    parts: list[Taught] = []
    start = 0.0
    for batch in batches_of(capture, order, itertools.islice(numbers, BILL_BATCHES), world):
        parts.append(teach(capture, batch, world))
        # The first batch pays for the loader's start, and is not timed unless it is the only one.
        start = start or time.monotonic()
    timed = parts[1:] or parts
    rows = join(parts, plan)
    images_per_s = sum(len(part.batch.sample_ids) for part in timed) / max(time.monotonic() - start, 1e-3)
    size = _bytes(plan, rows)
    half_k = _half_top_k(plan, rows, size)
    return Bill(
        recipe=capture.recipe,
        origins=capture.origins,
        rows=plan.rows,
        shards=plan.views * plan.shards,
        bytes=size,
        bytes_per_row=round(size / plan.rows, 1),
        images_per_s=round(images_per_s, 1),
        hours=round(plan.rows / images_per_s / 3600, 4),
        free_bytes=free_bytes(out),
        mass=_mass(rows),
        half_top_k=half_k,
        half_top_k_mass=None if half_k is None else _mass(rows, half_k),
        half_views=plan.views // 2 or None,
        **image_cache.bill(recipe.data, (capture.source, "train", capture.view)),
    )


def _bytes(plan: Plan, rows: Rows) -> int:
    """The size of a whole store, from some rows of it: what a shard has besides its rows, and what a row has."""
    return _bytes_of_a_view(plan, rows, first=True) + (plan.views - 1) * _bytes_of_a_view(plan, rows, first=False)


def _bytes_of_a_view(plan: Plan, rows: Rows, first: bool) -> int:
    n = len(rows)
    full, half = (_encoded(plan, at(rows, slice(size)), first) for size in (n, n // 2))
    per_row = (full - half) / (n - n // 2)
    return round(plan.shards * (full - n * per_row) + plan.samples * per_row)


def _encoded(plan: Plan, rows: Rows, first: bool) -> int:
    """The size of a shard of just these rows, of the first view or of another."""
    if len(rows) == 0:
        return 0
    alone = replace(plan, samples=len(rows), shard_rows=len(rows), shard_sizes=None)
    dealt = replace(rows, sample_id=alone.dealing.sample_ids(0))
    extra = {CONTENT_CRC: np.zeros(len(rows), np.uint32)} if first else {}
    return len(encode(alone, 0, 0, dealt, np.zeros(min(PROBES, len(rows)), np.uint32), extra=extra))


def _half_top_k(plan: Plan, rows: Rows, size: int) -> int | None:
    """The largest k whose store has half of `size`."""
    if plan.sample:
        return None
    fits = lambda k: _bytes(replace(plan, top_k=k, min_k=min(k, plan.min_k)), trim(rows, k)) <= size / 2  # noqa: E731
    most = bisect.bisect_right(range(1, plan.top_k), False, key=lambda k: not fits(k))
    return most or None


def _mass(rows: Rows, k: int | None = None) -> float:
    """Mean mass of the first k classes."""
    return round(float(np.exp(rows.log_prob[:, :k].astype(np.float64)).sum(axis=1).mean()), 6)


def _part(pieces: Sequence[Piece], shards: tuple[int, int] | None) -> Sequence[Piece]:
    """
    Raises:
        UsageError: the store has no such shards.
    """
    if shards is None:
        return pieces
    if not 0 <= shards[0] < shards[1] <= len(pieces):
        raise UsageError(f"--shards {shards[0]}:{shards[1]}: the store has shards 0:{len(pieces)}")
    return pieces[slice(*shards)]


def _summary(
    status: str, out: Path, plan: Plan, manifest: Manifest, images_per_s: float | None, wall_s: float
) -> Summary:
    return Summary(
        status=status,
        store=str(out),
        rows=manifest.rows,
        views=plan.views,
        shards=len(manifest.shards),
        bytes=manifest.bytes,
        bytes_per_row=round(manifest.bytes / max(1, manifest.rows), 1),
        top1=manifest.top1,
        top5=manifest.top5,
        images_per_s=images_per_s and round(images_per_s, 1),
        wall_s=round(wall_s, 2),
        skipped=len(manifest.skipped),
        store_id=plan.sha256,
    )
