"""`distill teacher-logits`: write a store of a teacher's sparse logits over the views of some images."""

import functools
import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill_cli.data import open_train
from distill_cli.data.loader import Batch, Batches, load
from distill_cli.data.sources import Source, check_classes, fingerprint
from distill_cli.data.views import DEFAULTS, View, checksum, resolve_view, train_transform
from distill_cli.distributed import Signals, World, stopped
from distill_cli.errors import DistillError, UsageError
from distill_cli.files import check_ours, free_bytes, locked
from distill_cli.metrics import autocast
from distill_cli.recipe import Recipe, update
from distill_cli.report import Report
from distill_cli.software import versions
from distill_cli.sparse import top_k
from distill_cli.store.exact import Rows, encode
from distill_cli.store.plan import MANIFEST, PLAN, PROBES, Dealing, Manifest, Plan
from distill_cli.store.writer import StoreWriter, check_plan
from distill_cli.students.build import check_forward
from distill_cli.teachers import Frozen, load_frozen

DEFAULT_TOP_K = 10
BILL_BATCHES = 6
"""Batches that a dry run times."""


@dataclass(frozen=True)
class Summary:
    status: str
    """`done` or `already_done`."""
    store: str
    rows: int
    views: int
    shards: int
    bytes: int
    bytes_per_row: float
    top1: float | None
    """The teacher's own accuracy on the rows, in percent; None without labels."""
    top5: float | None
    images_per_s: float | None
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


@dataclass(frozen=True)
class _Capture:
    """Everything that the rows depend on, opened and checked."""

    recipe: Recipe
    origins: dict[str, str]
    teacher: Frozen
    source: Source
    view: View
    plan: Plan


@dataclass(frozen=True)
class CaptureOrder:
    """Batch number -> (view, sample ids), shard after shard; a batch never crosses shards, so that what is in a shard
    does not depend on which others were missing."""

    dealing: Dealing
    missing: tuple[tuple[int, int], ...]
    """(view, shard)."""
    batch_size: int

    def batches(self, shard: int) -> int:
        return -(-len(self.dealing.places(shard)) // self.batch_size)

    def numbers(self) -> Iterator[int]:
        for index, (_, shard) in enumerate(self.missing):
            first = index * self._stride
            yield from range(first, first + self.batches(shard))

    def __call__(self, number: int) -> tuple[int, NDArray[np.int64]]:
        index, batch = divmod(number, self._stride)
        view, shard = self.missing[index]
        return view, _ids_of(self.dealing, shard)[batch * self.batch_size : (batch + 1) * self.batch_size]

    @property
    def _stride(self) -> int:
        return -(-self.dealing.shard_rows // self.batch_size)


@functools.lru_cache(maxsize=2)
def _ids_of(dealing: Dealing, shard: int) -> NDArray[np.int64]:
    return dealing.sample_ids(shard)


def teacher_logits(recipe: Recipe, out: Path, world: World, report: Report | None = None) -> Summary:
    """Write the store of `recipe.teacher` over `recipe.data` to `out`, or what is missing of it.

    Raises:
        UsageError, MismatchError: teacher, data and settings do not fit, or `out` holds something else.
        DistillError: an image cannot be decoded, or the teacher's output is not finite.
        BusyError: another process writes there.
        Stopped: a signal came; the finished shards stay.
    """
    report = report or Report()
    if world.size > 1:
        raise UsageError("teacher-logits: started by torchrun with several ranks; this version writes with one process")
    check_ours(out, (PLAN, MANIFEST), "store")
    start = time.monotonic()
    capture = _open(recipe, world, report)
    manifest = check_plan(out, capture.plan)
    if manifest is not None:
        report.stage(f"{out}: complete already, {manifest.rows} rows")
        return _summary("already_done", out, capture.plan, manifest, None, time.monotonic() - start)
    with locked(out):
        writer = StoreWriter(out, capture.plan, capture.source.labels)
        captured = _capture(capture, writer, world, report)
        manifest = writer.finish()
    wall_s = time.monotonic() - start
    own = "" if manifest.top1 is None else f"; the teacher's own top1 on them is {manifest.top1:.2f}"
    report.stage(f"{out}: {manifest.rows} rows, {manifest.bytes} bytes{own}")
    if manifest.skipped:
        report.warn(f"{out}: {len(manifest.skipped)} images could not be decoded and have no rows")
    return _summary("done", out, capture.plan, manifest, captured / wall_s, wall_s)


def bill(recipe: Recipe, out: Path, world: World, report: Report | None = None) -> Bill:
    """What the store would cost, from a few batches of the real thing; writes nothing.

    Raises:
        as `teacher_logits`.
    """
    report = report or Report()
    check_ours(out, (PLAN, MANIFEST), "store")
    capture = _open(recipe, world, report)
    check_plan(out, capture.plan)
    plan = capture.plan
    order = CaptureOrder(plan.dealing, ((0, 0),), recipe.store.batch_size)
    report.stage("timing a few batches")
    parts, start = [], 0.0
    for batch in _loaded(capture, order, itertools.islice(order.numbers(), BILL_BATCHES), world):
        parts.append(_teach(capture, batch, world))
        # The first batch pays for the loader's start, and is not timed unless it is the only one.
        start = start or time.monotonic()
    timed = parts[1:] or parts
    images_per_s = sum(map(len, timed)) / max(time.monotonic() - start, 1e-3)
    rows = _join(parts)
    full, head = (len(encode(plan, 0, 0, part, np.zeros(PROBES, np.uint32))) for part in (rows, _join([], plan.top_k)))
    size = plan.views * plan.shards * head + plan.rows * (full - head) // max(1, len(rows))
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
    )


def _open(recipe: Recipe, world: World, report: Report) -> _Capture:
    """Open teacher and data and settle what they decide."""
    report.stage("opening the data")
    source = open_train(recipe.data)
    report.stage(f"{len(source)} images; loading the teacher")
    teacher = load_frozen(recipe.teacher)
    check_classes(source, f"teacher {recipe.teacher.name}", teacher.num_classes, teacher.classes)
    view = resolve_view(recipe.data, teacher.input(recipe.data.image_size))
    teacher.model.to(world.device)
    check_forward(teacher.model, f"teacher {teacher.name}", view.image_size)
    k = recipe.store.top_k or min(DEFAULT_TOP_K, teacher.num_classes)
    if k > teacher.num_classes:
        raise UsageError(f"--top-k {k}: the teacher has {teacher.num_classes} classes; give at most that")
    plan = Plan(
        teacher={
            "name": teacher.name,
            "weights_sha256": teacher.weights_sha256,
            "num_classes": teacher.num_classes,
            "classes": _listed(teacher.classes or source.classes),
        },
        data=fingerprint(source),
        transform={name: _listed(value) for name, value in asdict(view).items()},
        samples=len(source),
        views=recipe.store.views,
        top_k=k,
        shard_rows=recipe.store.shard_rows,
        seed=recipe.store.seed,
        precision=recipe.store.precision,
        codec=recipe.store.codec,
        software=versions(),
    )
    settled = {f"data.{name}": value for name, value in asdict(view).items()} | {"store.top_k": k}
    origins = {path: "default" if path.removeprefix("data.") in DEFAULTS else "teacher" for path in settled}
    return _Capture(update(recipe, settled), origins, teacher, source, view, plan)


def _capture(capture: _Capture, writer: StoreWriter, world: World, report: Report) -> int:
    """Compute and write the missing shards; gives the number of rows that were computed."""
    plan, missing = capture.plan, tuple(writer.missing())
    order = CaptureOrder(plan.dealing, missing, capture.recipe.store.batch_size)
    todo = sum(len(plan.dealing.places(shard)) for _, shard in missing)
    report.stage(f"writing {len(missing)} of {plan.views * plan.shards} shards to {writer.path}")
    loaded = _loaded(capture, order, order.numbers(), world)
    captured = 0
    with Signals() as signals, report.progress("teacher-logits", plan.rows, plan.rows - todo) as progress:
        for view, shard in missing:
            parts: list[Rows] = []
            probes: list[int] = []
            for batch in itertools.islice(loaded, order.batches(shard)):
                parts.append(_teach(capture, batch, world))
                probes += [checksum(image) for image in batch.images[: PROBES - len(probes)].cpu()]
                progress.advance(len(batch) + len(batch.skipped))
                if signals.received:
                    raise stopped(
                        signals.received, f"{writer.path}: finished shards are kept; the same command goes on"
                    )
            rows = _join(parts, plan.top_k)
            writer.write(view, shard, rows, np.array(probes, np.uint32))
            captured += len(rows)
    return captured


def _loaded(capture: _Capture, order: CaptureOrder, numbers: Iterator[int], world: World) -> Iterator[Batch]:
    batches = Batches(
        capture.source,
        train_transform(capture.view),
        order,
        seed=capture.plan.seed,
        skip_unreadable=capture.recipe.data.skip_unreadable,
    )
    return load(batches, numbers, world.workers, world.device)


@torch.inference_mode()
def _teach(capture: _Capture, batch: Batch, world: World) -> Rows:
    """The teacher's rows of a batch.

    Raises:
        DistillError: an output is not finite; its image is named.
    """
    if len(batch) == 0:
        return _join([], capture.plan.top_k)
    with autocast(world.device, capture.plan.precision):
        logits = capture.teacher.model(batch.images).float()
    rows = top_k(logits, capture.plan.top_k)
    finite = logits.isfinite().all(dim=-1).cpu().numpy()
    if not finite.all():
        key = capture.source.keys[int(batch.sample_ids[~finite][0])]
        raise DistillError(
            f"teacher {capture.teacher.name}: output for {key} (view {batch.view}) is not finite; "
            "look at its weights, or use --precision fp32"
        )
    class_id, log_prob, log_tail = (part.cpu().numpy() for part in (rows.class_id, rows.log_prob, rows.log_tail))
    return Rows(batch.sample_ids, class_id, log_prob, log_tail)


def _join(parts: list[Rows], k: int = 0) -> Rows:
    if not parts:
        return Rows(np.empty(0, np.int64), np.empty((0, k), np.int64), np.empty((0, k)), np.empty(0))
    columns = ([getattr(part, column.name) for part in parts] for column in fields(Rows))
    return Rows(*map(np.concatenate, columns))


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


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
