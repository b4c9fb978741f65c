"""Filling a store from a teacher: shards are claimed one by one, their rows computed, and written beside the next.

Several processes, ranks of torchrun or started by hand, fill one store: a shard is claimed by a lock that ends with
its process, and what is in a shard does not depend on who computed it.
"""

import functools
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_cli.data import open_train
from distill_cli.data.images import printable
from distill_cli.data.loader import Batch, Batches, load
from distill_cli.data.sources import Source, check_classes, fingerprint
from distill_cli.data.views import DEFAULTS, View, check_decoder, resolve_view, train_transform
from distill_cli.distributed import Signals, World, stopped
from distill_cli.errors import DistillError, UsageError
from distill_cli.locks import Claims
from distill_cli.metrics import autocast
from distill_cli.recipe import Recipe, update
from distill_cli.report import Progress, Report
from distill_cli.software import versions
from distill_cli.sparse import SparseLogits, keep_mass, sample_tail, sampling_uniforms, top_k
from distill_cli.store.dealing import Dealing
from distill_cli.store.plan import PROBES, Plan
from distill_cli.store.rows import Rows
from distill_cli.store.writer import StoreWriter
from distill_cli.students.build import check_forward
from distill_cli.teachers import Frozen, load_frozen

DEFAULT_TOP_K = 10
DEFAULT_BITS = 8
QUEUED_BATCHES = 16
"""Batches of rows that wait to be written; beyond them the teacher waits."""
POLL_S = 0.5
"""How often a process with nothing left to claim looks whether the others are done, or gone."""

Piece = tuple[int, int]
"""(view, shard)."""


@dataclass(frozen=True)
class Capture:
    """Everything that the rows depend on, opened and checked."""

    recipe: Recipe
    """With nothing left open."""
    origins: dict[str, str]
    """Of the values that the data and the teacher decide."""
    teacher: Frozen
    source: Source
    view: View
    plan: Plan


def open_capture(recipe: Recipe, world: World, report: Report) -> Capture:
    """Open teacher and data and settle what they decide.

    Raises:
        UsageError, MismatchError: they do not fit each other, or the recipe.
    """
    report.stage("opening the data")
    source = open_train(recipe.data, report)
    report.stage(f"{len(source)} images; loading the teacher")
    teacher = load_frozen(recipe.teacher)
    check_classes(source, f"teacher {recipe.teacher.name}", teacher.num_classes, teacher.classes)
    view = resolve_view(recipe.data, teacher.input(recipe.data.image_size))
    check_decoder(view, world.device)
    teacher.model.to(world.device)
    check_forward(teacher.model, f"teacher {teacher.name}", view.image_size)
    store = recipe.store
    k = min(DEFAULT_TOP_K, teacher.num_classes) if store.top_k is None else store.top_k
    bits = (store.bits or DEFAULT_BITS) if store.codec == "compact" else None
    _check_rows(recipe, k, teacher.num_classes)
    plan = Plan(
        teacher={
            "name": teacher.name,
            "weights_sha256": teacher.weights_sha256,
            "num_classes": teacher.num_classes,
            "classes": _listed(teacher.classes or source.classes),
        },
        data=fingerprint(source),
        transform=view.table,
        samples=len(source),
        views=store.views,
        first_view=store.first_view,
        top_k=k,
        keep_mass=store.keep_mass,
        min_k=store.min_k,
        sample=store.sample,
        shard_rows=store.shard_rows,
        seed=store.seed,
        precision=store.precision,
        codec=store.codec,
        bits=bits,
        software=versions(),
    )
    settled = {f"data.{name}": value for name, value in view.table.items()} | {"store.top_k": k, "store.bits": bits}
    origins = {path: "default" if path.removeprefix("data.") in DEFAULTS else "teacher" for path in settled}
    return Capture(update(recipe, settled), origins, teacher, source, view, plan)


@dataclass(frozen=True)
class CaptureOrder:
    """Batch number -> (view, sample ids), shard after shard; a batch never crosses shards, so that what is in a shard
    does not depend on which others were missing."""

    dealing: Dealing
    shards: int
    """Of a view."""
    batch_size: int

    def batches(self, piece: Piece) -> int:
        return -(-len(self.dealing.places(piece[1])) // self.batch_size)

    def numbers(self, piece: Piece) -> range:
        """The batches of one shard."""
        first = (piece[0] * self.shards + piece[1]) * self._stride
        return range(first, first + self.batches(piece))

    def __call__(self, number: int) -> tuple[int, NDArray[np.int64]]:
        index, batch = divmod(number, self._stride)
        view, shard = divmod(index, self.shards)
        return view, _ids_of(self.dealing, shard)[batch * self.batch_size : (batch + 1) * self.batch_size]

    @property
    def _stride(self) -> int:
        return -(-self.dealing.shard_rows // self.batch_size)


@functools.lru_cache(maxsize=2)
def _ids_of(dealing: Dealing, shard: int) -> NDArray[np.int64]:
    return dealing.sample_ids(shard)


def fill(
    capture: Capture, writer: StoreWriter, claims: Claims, pieces: Sequence[Piece], world: World, report: Report
) -> int:
    """Compute and write those of some shards that are missing, until all of them are there, whoever wrote them.

    Gives the number of rows that this process computed.

    Raises:
        DistillError: an image cannot be decoded, or the teacher's output is not finite.
        OSError: a shard could not be written.
        Stopped: a signal came; the finished shards stay.
    """
    plan = capture.plan
    rows = {piece: len(plan.dealing.places(piece[1])) for piece in pieces}
    missing = [piece for piece in pieces if not writer.is_there(*piece)]
    total, todo = sum(rows.values()), sum(rows[piece] for piece in missing)
    report.stage(f"writing {len(missing)} of {len(pieces)} shards to {writer.path}")
    with (
        Signals() as signals,
        report.progress("teacher-logits", total, total - todo) as progress,
        _Sink(capture, writer, claims) as sink,
    ):
        while missing:
            mine = _pass(capture, missing, claims, sink, signals, progress, world)
            sink.flush()
            others = [piece for piece in missing if piece not in mine and writer.is_there(*piece)]
            if others:
                progress.advance(sum(rows[piece] for piece in others))
            missing = [piece for piece in missing if piece not in mine and piece not in others]
            if missing and not mine:
                time.sleep(POLL_S)
            _stop(signals, writer)
    return sink.rows


def _pass(
    capture: Capture,
    missing: Sequence[Piece],
    claims: Claims,
    sink: "_Sink",
    signals: Signals,
    progress: Progress,
    world: World,
) -> set[Piece]:
    """Compute all shards that can be claimed; gives those."""
    plan, mine = capture.plan, set[Piece]()
    order = CaptureOrder(plan.dealing, plan.shards, capture.recipe.store.batch_size)
    begun: deque[Piece] = deque()
    claimed = _claimed(plan, missing, claims, sink.writer, begun)
    first = next(claimed, None)
    if first is None:
        return mine
    numbers = (number for piece in itertools.chain([first], claimed) for number in order.numbers(piece))
    left = 0
    for batch in batches_of(capture, order, numbers, world):
        if left == 0:
            piece = begun.popleft()
            left = order.batches(piece)
            mine.add(piece)
        sink.put(piece, teach(capture, batch, world))
        left -= 1
        if left == 0:
            sink.put(piece, None)
        progress.advance(len(batch) + len(batch.skipped))
        _stop(signals, sink.writer)
    return mine


def _claimed(
    plan: Plan, missing: Sequence[Piece], claims: Claims, writer: StoreWriter, begun: deque[Piece]
) -> Iterator[Piece]:
    """Claim shard after shard, each when its first batch is about to be loaded."""
    for piece in missing:
        if not claims.claim(number_of(plan, piece)):
            continue
        # Whoever had it before may have finished it.
        if writer.is_there(*piece):
            claims.release(number_of(plan, piece))
            continue
        begun.append(piece)
        yield piece


def number_of(plan: Plan, piece: Piece) -> int:
    """The number of a shard among those of all views."""
    return piece[0] * plan.shards + piece[1]


def batches_of(capture: Capture, order: CaptureOrder, numbers: Iterator[int], world: World) -> Iterator[Batch]:
    """The teacher's inputs, batch by batch."""
    batches = Batches(
        capture.source,
        train_transform(capture.view),
        order,
        drawn=capture.plan.drawn,
        skip_unreadable=capture.recipe.data.skip_unreadable,
        probes=PROBES,
    )
    return load(batches, numbers, world.workers, world.device)


@dataclass(frozen=True)
class Taught:
    """The teacher's rows of a batch, on their way from the device."""

    rows: SparseLogits
    finite: Tensor
    """bool `[batch]`."""
    batch: Batch
    """Of which they are; without its images."""
    copied: torch.cuda.Event | None
    """When it is past, the tensors are there."""


@torch.inference_mode()
def teach(capture: Capture, batch: Batch, world: World) -> Taught:
    """The teacher's rows of a batch; where there is a GPU, without waiting for it."""
    plan = capture.plan
    logits = torch.empty(0, plan.num_classes, device=world.device)
    if len(batch):
        logits = logits_of(capture, batch, world)
    rows, finite = rows_of(plan, logits, batch), logits.isfinite().all(dim=-1)
    rest = replace(batch, images=torch.empty(0))
    if world.device.type == "cpu":
        return Taught(rows, finite, rest, copied=None)
    parts = (rows.class_id, rows.log_prob, rows.log_tail, rows.count)
    rows = SparseLogits(*(None if part is None else _to_host(part) for part in parts))  # type: ignore[arg-type]
    finite, copied = _to_host(finite), torch.cuda.Event()
    copied.record()
    return Taught(rows, finite, rest, copied)


def logits_of(capture: Capture, batch: Batch, world: World) -> Tensor:
    """The teacher's output for a batch: float32 `[batch, classes]`."""
    with autocast(world.device, capture.plan.precision):
        logits: Tensor = capture.teacher.model(batch.images)
    return logits.float()


def rows_of(plan: Plan, logits: Tensor, batch: Batch) -> SparseLogits:
    """What is kept of the teacher's output."""
    if plan.sample:
        seed, drawn = plan.drawn[batch.view]
        uniform = torch.from_numpy(sampling_uniforms(seed, drawn, batch.sample_ids)).to(logits.device)
        return sample_tail(logits, plan.top_k, plan.sample, uniform)
    rows = top_k(logits, plan.top_k)
    return rows if plan.keep_mass is None else keep_mass(rows, plan.keep_mass, plan.min_k)


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class _Sink:
    """A thread that copies, encodes and writes rows while the teacher works on the next; shards are released by it."""

    def __init__(self, capture: Capture, writer: StoreWriter, claims: Claims) -> None:
        self.capture, self.writer, self.claims = capture, writer, claims
        self.rows = 0
        """Written by this process."""
        self._queue: queue.Queue[tuple[Piece, Taught | None] | None] = queue.Queue(QUEUED_BATCHES)
        self._error: BaseException | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)

    def put(self, piece: Piece, taught: Taught | None) -> None:
        """Hand over the rows of a batch; None ends its shard.

        Raises:
            what the thread met before.
        """
        self._raise()
        self._queue.put((piece, taught))

    def flush(self) -> None:
        """Wait until all that was handed over is on disk."""
        self._queue.join()
        self._raise()

    def __enter__(self) -> "_Sink":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._cancelled = kind is not None
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        parts: list[Taught] = []
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None and not self._cancelled:
                    piece, taught = item
                    if taught is None:
                        self._write(piece, parts)
                        parts = []
                    else:
                        parts.append(self._arrived(taught))
            except BaseException as error:
                self._error = error
            finally:
                self._queue.task_done()

    def _arrived(self, taught: Taught) -> Taught:
        """
        Raises:
            DistillError: an output is not finite; its image is named.
        """
        if taught.copied is not None:
            taught.copied.synchronize()
        if not taught.finite.all():
            key = printable(self.capture.source.keys[int(taught.batch.sample_ids[~taught.finite.numpy()][0])])
            raise DistillError(
                f"teacher {self.capture.teacher.name}: output for {key} (view {taught.batch.view}) is not finite; "
                "look at its weights, or use --precision fp32"
            )
        return taught

    def _write(self, piece: Piece, parts: Sequence[Taught]) -> None:
        rows = join(parts, self.capture.plan)
        probes = [crc for taught in parts for crc in taught.batch.probe_crc][:PROBES]
        self.writer.write(*piece, rows, np.array(probes, np.uint32))
        self.claims.release(number_of(self.capture.plan, piece))
        self.rows += len(rows)


def join(parts: Sequence[Taught], plan: Plan) -> Rows:
    """The rows of several batches, one behind the other."""
    columns = [
        [getattr(taught.rows, name).numpy() for taught in parts] for name in ("class_id", "log_prob", "log_tail")
    ]
    class_id, log_prob, log_tail = map(np.concatenate, columns)
    count = np.concatenate([taught.rows.counts.numpy() for taught in parts]) if plan.form.ragged else None
    return Rows(np.concatenate([taught.batch.sample_ids for taught in parts]), class_id, log_prob, log_tail, count)


def _check_rows(recipe: Recipe, k: int, num_classes: int) -> None:
    """
    Raises:
        UsageError: the options of the rows do not fit each other, or the teacher.
    """
    store = recipe.store
    if k > num_classes:
        raise UsageError(f"--top-k {k}: the teacher has {num_classes} classes; give at most that")
    if k == 0 and not store.sample:
        raise UsageError("--top-k 0: keeps nothing of a row; give at least 1, or --sample N with it")
    if store.keep_mass is not None and store.sample:
        raise UsageError("--keep-mass and --sample: a sampled row keeps all of its mass already; give one of them")
    if store.keep_mass is not None and store.min_k > k:
        raise UsageError(f"--min-k {store.min_k}: is more than --top-k {k}; give at most that")
    if store.keep_mass is None and store.min_k != 1:
        raise UsageError(f"--min-k {store.min_k}: is of --keep-mass P only; give both, or neither")
    if store.bits is not None and store.codec != "compact":
        raise UsageError(f"store.bits {store.bits}: is of --codec compact only; give both, or neither")


def _stop(signals: Signals, writer: StoreWriter) -> None:
    if signals.received:
        raise stopped(signals.received, f"{writer.path}: finished shards are kept; the same command goes on")


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
