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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_cli.data import open_train
from distill_cli.data.batch import Batch
from distill_cli.data.batches import Batches
from distill_cli.data.images import printable
from distill_cli.data.loader import load
from distill_cli.data.mixing import DrawnPartners, capture_partners, together
from distill_cli.data.sources import Source, check_classes, fingerprint, parts
from distill_cli.data.views import DEFAULTS, View, check_decoder, resolve_view, train_transform
from distill_cli.distributed import Signals, World, stopped
from distill_cli.errors import DistillError, UsageError
from distill_cli.locks import Claims
from distill_cli.metrics import autocast
from distill_cli.recipe import Recipe, update
from distill_cli.report import Progress, Report
from distill_cli.software import versions
from distill_cli.sparse import SparseLogits, keep_mass, sample_tail, sampling_uniforms, top_k
from distill_cli.store.dealing import Dealing, Following
from distill_cli.store.plan import PROBES, Plan
from distill_cli.store.rows import Rows, at
from distill_cli.store.shard import CONTENT_CRC
from distill_cli.store.writer import StoreWriter
from distill_cli.students.build import check_forward
from distill_cli.teachers import Frozen, check_classifier, load_frozen

DEFAULT_TOP_K = 10
DEFAULT_BITS = 8
DEFAULT_SHARD_ROWS = 16384
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
    check_classifier(teacher, f"--teacher {recipe.teacher.name}")
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
        **shards_of(recipe, source),
        seed=store.seed,
        precision=store.precision,
        codec=store.codec,
        bits=bits,
        software=versions(),
    )
    settled = {f"data.{name}": value for name, value in view.table.items()} | {"store.top_k": k, "store.bits": bits}
    origins = {path: "default" if path.removeprefix("data.") in DEFAULTS else "teacher" for path in settled}
    if plan.shard_sizes is not None:
        settled["store.order"], origins["store.order"] = "tars", "data"
    else:
        settled |= {"store.order": "dealt", "store.shard_rows": plan.shard_rows}
        origins |= {"store.order": "data" if store.shard_rows is None else "shard_rows", "store.shard_rows": "default"}
    return Capture(update(recipe, settled), origins, teacher, source, view, plan)


@dataclass(frozen=True)
class CaptureOrder:
    """Batch number -> (view, sample ids), shard after shard; a batch never crosses shards, so that what is in a shard
    does not depend on which others were missing.

    Two samples that are mixed lie in one batch, so that it is decided once whether both can be read; batches then have
    an even size.
    """

    dealing: Dealing | Following
    batch_size: int
    partners: DrawnPartners | None = None

    @classmethod
    def of(cls, plan: Plan, view: View, batch_size: int) -> "CaptureOrder":
        """The order of a plan; where its view mixes, an odd batch size is taken as the even one below, at least 2."""
        partners = capture_partners(plan, view)
        even = max(2, batch_size - batch_size % 2)
        return cls(plan.dealing, batch_size if partners is None else even, partners)

    def batches(self, piece: Piece) -> int:
        return -(-len(self.dealing.places(piece[1])) // self.batch_size)

    def numbers(self, piece: Piece) -> range:
        """The batches of one shard."""
        first = (piece[0] * self.dealing.shards + piece[1]) * self._stride
        return range(first, first + self.batches(piece))

    def piece(self, number: int) -> Piece:
        """The shard of a batch."""
        return divmod(number // self._stride, self.dealing.shards)

    def __call__(self, number: int) -> tuple[int, NDArray[np.int64]]:
        view, shard = self.piece(number)
        first = number % self._stride * self.batch_size
        ids = _ids_of(self.dealing, shard) if self.partners is None else _pairs_of(self.partners, view, shard)
        return view, ids[first : first + self.batch_size]

    @property
    def _stride(self) -> int:
        """Numbers of a shard; one with fewer batches leaves some out."""
        return -(-self.dealing.largest // self.batch_size)


@functools.lru_cache(maxsize=2)
def _ids_of(dealing: Dealing | Following, shard: int) -> NDArray[np.int64]:
    return dealing.sample_ids(shard)


@functools.lru_cache(maxsize=2)
def _pairs_of(partners: DrawnPartners, view: int, shard: int) -> NDArray[np.int64]:
    ids = partners.dealing.sample_ids(shard)
    return together(ids, partners(view, ids))


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
    if plan.shard_sizes is not None:
        # All views of a tar, then the next tar: one behind a URL is fetched once.
        missing.sort(key=lambda piece: (piece[1], piece[0]))
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
    order = CaptureOrder.of(plan, capture.view, capture.recipe.store.batch_size)
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
        partners=capture_partners(capture.plan, capture.view),
        probes=capture.plan.dealing,
        with_content_crc=True,
    )
    return load(batches, numbers, world.workers, world.device)


@dataclass(frozen=True)
class Taught:
    """The teacher's rows of a batch, on their way from the device."""

    rows: SparseLogits
    finite: Tensor
    """bool `[batch]`."""
    labels: Tensor
    """int64 `[batch]`: by which the teacher is right or not; of a mixed image that of the larger share."""
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
    rest, labels = replace(batch, images=torch.empty(0)), batch.larger_labels
    if world.device.type == "cpu":
        return Taught(rows, finite, labels, rest, copied=None)
    parts = (rows.class_id, rows.log_prob, rows.log_tail, rows.count)
    rows = SparseLogits(*(None if part is None else _to_host(part) for part in parts))  # type: ignore[arg-type]
    finite, labels, copied = _to_host(finite), _to_host(labels), torch.cuda.Event()
    copied.record()
    return Taught(rows, finite, labels, rest, copied)


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
        plan = self.capture.plan
        rows = join(parts, plan)
        by_place = np.argsort(plan.dealing.place(rows.sample_id))
        rows, labels = at(rows, by_place), np.concatenate([taught.labels.numpy() for taught in parts])[by_place]
        ids = rows.sample_id.tolist()
        crc = {sample_id: crc for taught in parts for sample_id, crc in taught.batch.probe_crc.items()}
        probes = np.array([crc[sample_id] for sample_id in ids[:PROBES]], np.uint32)
        contents = {sample_id: crc for taught in parts for sample_id, crc in taught.batch.content_crc.items()}
        extra = {CONTENT_CRC: np.array([contents[i] for i in ids], np.uint32)} if piece[0] == 0 else {}
        self.writer.write(*piece, rows, probes, self.writer.hits(rows, labels), extra)
        self.claims.release(number_of(plan, piece))
        self.rows += len(rows)


def join(parts: Sequence[Taught], plan: Plan) -> Rows:
    """The rows of several batches, one behind the other."""
    columns = [
        [getattr(taught.rows, name).numpy() for taught in parts] for name in ("class_id", "log_prob", "log_tail")
    ]
    class_id, log_prob, log_tail = map(np.concatenate, columns)
    count = np.concatenate([taught.rows.counts.numpy() for taught in parts]) if plan.form.ragged else None
    return Rows(np.concatenate([taught.batch.sample_ids for taught in parts]), class_id, log_prob, log_tail, count)


def shards_of(recipe: Recipe, source: Source) -> dict[str, Any]:
    """`shard_rows` and `shard_sizes` of a plan: a shard for each tar, or samples dealt to shards of so many rows.

    Raises:
        UsageError: the shards are to follow tars and the data has none, or are to have so many rows all the same.
    """
    store, sizes = recipe.store, parts(source)
    if store.order == "tars" and sizes is None:
        raise UsageError(f"store.order tars: --data {recipe.data.path} is no tars; give wds:PATTERN, or leave it out")
    if store.order == "tars" and store.shard_rows is not None:
        raise UsageError(
            f"--shard-rows {store.shard_rows}: store.order is tars, and shards end where these end; give one of them"
        )
    if sizes is None or store.order == "dealt" or store.shard_rows is not None:
        return {"shard_rows": store.shard_rows or DEFAULT_SHARD_ROWS}
    return {"shard_rows": max(sizes), "shard_sizes": sizes}


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
