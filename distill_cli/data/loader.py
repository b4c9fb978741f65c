"""Batches: which samples a step holds, and the processes that load them.

The content of a batch is a function of its number, so a loader can start anywhere, with any number of workers,
and nothing about it needs saving.
"""

import functools
import itertools
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from distill_cli.data.pixels import Pixels
from distill_cli.data.sources import Source, UnreadableImage
from distill_cli.data.tensors import Undecoded
from distill_cli.data.views import Transform, empty_bytes
from distill_cli.errors import DistillError
from distill_cli.randomness import derive, preserved
from distill_cli.sparse import SparseLogits, stacked

Rows = Callable[[int, NDArray[np.int64]], SparseLogits]
"""(view, sample ids) -> the teacher's rows: how a store gives them to the loader."""


@dataclass(frozen=True)
class Batch:
    """Some samples as seen by a view; where there are several views, all samples by the first, then by the next."""

    images: Tensor
    """float32 `[batch, 3, height, width]`, normalised."""
    labels: Tensor
    """int64 `[batch]`; -1 where the data has no labels."""
    sample_ids: NDArray[np.int64]
    views: tuple[int, ...]
    teacher: SparseLogits | None = None
    skipped: tuple[str, ...] = ()
    """The messages of images that could not be decoded and are not in the batch."""
    probe_crc: tuple[int, ...] = ()
    """Checksums of its first images, where they were asked for."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def view(self) -> int:
        """The only one, or the first of several."""
        return self.views[0]

    def without(self, unreadable: Mapping[int, UnreadableImage]) -> "Batch":
        """The batch without some samples, by their places; what is said of them is in `skipped`."""
        samples = len(self) // len(self.views)
        kept = np.flatnonzero([place % samples not in unreadable for place in range(len(self))])
        at = torch.from_numpy(kept)
        return replace(
            self,
            labels=self.labels[at],
            sample_ids=self.sample_ids[kept],
            teacher=self.teacher and self.teacher.at(at),
            skipped=(*self.skipped, *map(str, unreadable.values())),
        )


@dataclass(frozen=True)
class Loaded:
    """A batch as a loader process hands it over: its images are still the bytes that were drawn."""

    batch: Batch
    """Its `images` are empty."""
    pixels: Pixels | Undecoded | None
    """None where no image could be decoded."""
    probes: int = 0
    """Images that are checksummed, at most."""
    skip_unreadable: bool = False

    def to(self, device: torch.device) -> "Loaded":
        """
        Raises:
            UnreadableImage: an image that is decoded there cannot be, and is not to be skipped.
        """
        here = self._decoded(device) if isinstance(self.pixels, Undecoded) else self
        return here._each(lambda part: part.to(device, non_blocking=True), lambda part: part.to(device))

    def pin_memory(self) -> "Loaded":
        return self._each(Tensor.pin_memory, lambda part: part.pin_memory())

    def _each(self, tensor: Callable[[Tensor], Tensor], other: Callable[[Any], Any]) -> "Loaded":
        batch, pixels = self.batch, self.pixels
        moved = replace(batch, labels=tensor(batch.labels), teacher=batch.teacher and other(batch.teacher))
        return replace(self, batch=moved, pixels=pixels and other(pixels))

    def _decoded(self, device: torch.device) -> "Loaded":
        assert isinstance(self.pixels, Undecoded)
        pixels, unreadable = self.pixels.made(device)
        if unreadable and not self.skip_unreadable:
            raise next(iter(unreadable.values()))
        batch = self.batch.without(unreadable) if unreadable else self.batch
        return replace(self, batch=batch, pixels=pixels).checked()

    def checked(self) -> "Loaded":
        """With the checksums of its first images, where they are there already."""
        if not self.probes or not isinstance(self.pixels, Pixels):
            return self
        probes = range(min(self.probes, len(self.batch) // len(self.batch.views)))
        return replace(self, batch=replace(self.batch, probe_crc=tuple(map(self.pixels.checksum, probes))))

    def finished(self, transform: Transform) -> Batch:
        """The batch with its images, made where the pixels are."""
        assert not isinstance(self.pixels, Undecoded)
        return self.batch if self.pixels is None else replace(self.batch, images=transform.inputs(self.pixels))


ROWS_AHEAD = 8192
"""Rows of a store that are read at once, for several batches."""

Order = Callable[[int], tuple[int, NDArray[np.int64]]]
"""Batch number -> (view, sample ids)."""


@dataclass(frozen=True)
class TrainingOrder:
    """Samples shuffled by (seed, pass) and cut into global batches, of which a rank takes its slice.

    With one view a read a pass is an epoch, and epoch e reads view e mod views. With N a pass is N epochs: a sample is
    read once in it and seen by N views in the same step, so that an epoch has as many steps as ever. What does not
    fill a last batch waits for another pass's shuffle.

    Paper: Shen and Xing 2022, arXiv:2112.01528, 3.2 (FKD's several crops of an image in one mini-batch).
    """

    sample_ids: NDArray[np.int64]
    batch_size: int
    """Inputs of a step, global, over all ranks: N times the samples."""
    seed: int
    views: int
    rank: int = 0
    world_size: int = 1
    views_per_read: int = 1
    """N."""

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.sample_ids) // self.images_per_step)

    @property
    def images_per_step(self) -> int:
        """Inputs, over all ranks."""
        return self._samples_per_step * self.views_per_read

    @property
    def _samples_per_step(self) -> int:
        return min(self.batch_size // self.views_per_read, len(self.sample_ids))

    @property
    def _steps_per_pass(self) -> int:
        epochs = self.views_per_read * (len(self.sample_ids) // self.images_per_step)
        return epochs or len(self.sample_ids) // self._samples_per_step

    def __call__(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """(first view, samples)."""
        number, place = divmod(step, self._steps_per_pass)
        shuffled = _permutation(derive("order", self.seed, number), len(self.sample_ids))
        chosen = shuffled[place * self._samples_per_step : (place + 1) * self._samples_per_step]
        first = number * self.views_per_read % self.views
        return first, self.sample_ids[np.array_split(chosen, self.world_size)[self.rank]]


@dataclass(frozen=True)
class ListingOrder:
    """Every sample once, in the order of the listing, dealt to ranks in turn; its view is 0."""

    sample_ids: NDArray[np.int64]
    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def batches(self) -> int:
        """How many batches this rank has."""
        return -(-len(self._mine) // self.batch_size)

    def __call__(self, number: int) -> tuple[int, NDArray[np.int64]]:
        return 0, self._mine[number * self.batch_size : (number + 1) * self.batch_size]

    @property
    def _mine(self) -> NDArray[np.int64]:
        return self.sample_ids[self.rank :: self.world_size]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(count)


AHEAD = 2
"""Batches that a loader process is ahead of use: torch's `prefetch_factor`."""


class SharedBytes:
    """What a loader process draws into: shared with the main process, a few pieces in turn.

    A process is given a batch's number when the main process takes the one that is `AHEAD` before it, and has then
    finished those before. So a piece is free after `AHEAD` + 1 batches, and used again: new shared memory costs as much
    as a resize, a page at a time, in either process.
    """

    def __init__(self) -> None:
        self._pieces: deque[Tensor] = deque(maxlen=AHEAD + 1)

    def empty(self, count: int) -> Tensor:
        """So many bytes."""
        if get_worker_info() is None:
            return empty_bytes(count)
        full = len(self._pieces) == self._pieces.maxlen
        piece = self._pieces.popleft() if full else empty_bytes(0)
        if len(piece) < count:
            piece = empty_bytes(count).share_memory_()
        self._pieces.append(piece)
        return piece[:count]


@dataclass
class Batches(Dataset["Loaded | DistillError"]):
    """Batch number -> batch. An error is handed over as a value: a worker's traceback would hide its one line."""

    source: Source
    transform: Transform
    order: Order
    seed: int = 0
    """Of the views."""
    drawn: Sequence[tuple[int, int]] | None = None
    """(seed, view) by which each view of a store is drawn, instead."""
    rows: Rows | None = None
    views_per_read: int = 1
    """Views that a sample is seen by each time it is decoded: that of the order, and those that follow it."""
    skip_unreadable: bool = False
    probes: int = 0
    """Images of each batch that are checksummed."""
    _ahead: dict[int, SparseLogits] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Rows of this process's next batches, by number."""
    _shared: "SharedBytes" = field(default_factory=lambda: SharedBytes(), init=False, repr=False, compare=False)

    def __getitem__(self, number: int) -> Loaded | DistillError:
        try:
            return self.draw(number)
        except DistillError as error:
            return error

    def load(self, number: int) -> Batch:
        """One batch, whole, in this process."""
        return self.draw(number).to(torch.device("cpu")).finished(self.transform)

    def draw(self, number: int) -> Loaded:
        """What a batch is made of.

        Raises:
            UnreadableImage: an image cannot be decoded, and is not to be skipped.
        """
        first, wanted = self.order(number)
        views = self._views(first)
        pixels, ids, skipped = self._draw(wanted, views)
        sample_ids = np.array(ids, np.int64)
        teacher = self._teacher(number, len(wanted)) if self.rows else None
        if teacher is not None and skipped:
            kept = np.tile(np.isin(wanted, sample_ids), len(views))
            teacher = teacher.at(torch.from_numpy(np.flatnonzero(kept)))
        labels = np.full(len(ids), -1) if self.source.labels is None else self.source.labels[sample_ids]
        batch = Batch(
            images=torch.empty(0),
            labels=torch.from_numpy(np.tile(labels, len(views))),
            sample_ids=np.tile(sample_ids, len(views)),
            views=views,
            teacher=teacher,
            skipped=tuple(skipped),
        )
        return Loaded(batch, pixels, self.probes, self.skip_unreadable).checked()

    def _views(self, first: int) -> tuple[int, ...]:
        views = range(first, first + self.views_per_read)
        return tuple(view % len(self.drawn) for view in views) if self.drawn else tuple(views)

    def _drawn(self, view: int) -> tuple[int, int]:
        """(seed, view) by which a view is drawn."""
        return self.drawn[view] if self.drawn else (self.seed, view)

    def _draw(
        self, wanted: NDArray[np.int64], views: Sequence[int]
    ) -> tuple[Pixels | Undecoded | None, list[int], list[str]]:
        """What is drawn of the images that can be decoded, their ids, and what is said of the others."""
        drawing = self.transform.drawing(len(wanted), len(views), self._shared.empty)
        drawn, ids, skipped = [self._drawn(view) for view in views], [], []
        with preserved():
            for sample_id in wanted.tolist():
                try:
                    drawing.add(self.transform.read(self.source, sample_id), drawn, sample_id)
                except UnreadableImage as error:
                    if not self.skip_unreadable:
                        raise
                    skipped.append(str(error))
                    continue
                ids.append(sample_id)
        return drawing.drawn() if ids else None, ids, skipped

    def _teacher(self, number: int, size: int) -> SparseLogits:
        """The rows of a batch, read for several batches at once: a shard then gives several each time."""
        assert self.rows is not None
        if number not in self._ahead:
            worker = get_worker_info()
            stride = worker.num_workers if worker else 1
            batches = max(1, ROWS_AHEAD // max(1, size))
            self._ahead.clear()
            self._read_ahead(range(number, number + stride * batches, stride))
        return self._ahead.pop(number)

    def _read_ahead(self, numbers: Iterable[int]) -> None:
        assert self.rows is not None
        wanted = [(number, *self.order(number)) for number in numbers]
        for first, group in itertools.groupby(wanted, key=lambda item: item[1]):
            batches = [(number, ids) for number, _, ids in group]
            every = np.concatenate([ids for _, ids in batches])
            rows = [self.rows(view, every) for view in self._views(first)]
            ends = np.cumsum([len(ids) for _, ids in batches])
            for (number, ids), end in zip(batches, ends.tolist(), strict=True):
                # Copies: what is sent to another process is sent with all the memory that it is a part of.
                part = slice(end - len(ids), end)
                self._ahead[number] = stacked([of_view.at(part) for of_view in rows])


def load(batches: Batches, numbers: Iterable[int], workers: int, device: torch.device) -> Iterator[Batch]:
    """Load the batches of these numbers, in order, ahead of use, onto a device; once, by processes that then end.

    Raises:
        DistillError: what a batch met, or a worker that died.
    """
    with closing(Loader(batches, numbers, workers, device)) as loader:
        yield from loader


class Loader:
    """Loads the batches of some numbers, in order, ahead of use, onto a device: as often as it is iterated.

    What crosses to the device are bytes, a quarter of the inputs that are made of them there. Beside a GPU the next
    batch crosses, on a stream of its own, while the last one is used.

    Args:
        workers: processes that load, from the first batch until `close`; 0 loads in this one.
    """

    def __init__(self, batches: Batches, numbers: Iterable[int], workers: int, device: torch.device) -> None:
        self._transform, self._device = batches.transform, device
        self._last: deque[Tensor] = deque(maxlen=workers * (AHEAD + 1))
        self._loader: DataLoader[Loaded | DistillError] | None = DataLoader(
            batches,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_main,
            persistent_workers=workers > 0,
            prefetch_factor=AHEAD if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        """
        Raises:
            DistillError: what a batch met, or a worker that died.
        """
        assert self._loader is not None, "it is closed"
        loaded = self._kept(_checked(iter(self._loader)))
        try:
            if self._device.type == "cuda":
                yield from _ahead_of_use(loaded, self._transform, self._device)
            else:
                yield from (drawn.to(self._device).finished(self._transform) for drawn in loaded)
        finally:
            # An error holds this frame, and the frame the workers: let go of them here, not when garbage is collected.
            loaded.close()
            del loaded

    def _kept(self, loaded: Generator[Loaded]) -> Generator[Loaded]:
        """Stay in the shared memory of the last batches, to which the processes come back."""
        try:
            for drawn in loaded:
                if isinstance(drawn.pixels, Pixels) and self._device.type == "cpu":
                    self._last.append(drawn.pixels.images)
                yield drawn
        finally:
            loaded.close()
            del loaded

    def close(self) -> None:
        """End the processes."""
        self._loader = None


def _checked(loaded: Iterator[Loaded | DistillError]) -> Generator[Loaded]:
    """
    Raises:
        DistillError: what a batch met, or a worker that died.
    """
    try:
        while True:
            try:
                drawn = next(loaded)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DistillError(f"{' '.join(str(error).split())} Run the same command again to go on") from error
            if isinstance(drawn, DistillError):
                raise drawn
            yield drawn
    finally:
        del loaded


def _ahead_of_use(loaded: Iterator[Loaded], transform: Transform, device: torch.device) -> Iterator[Batch]:
    """One batch ahead, copied and finished on a side stream."""
    side = torch.cuda.Stream(device)
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    for drawn in loaded:
        with torch.cuda.stream(side):
            batch = drawn.to(device).finished(transform)
            there = torch.cuda.Event()
            there.record(side)
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = batch, there
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(batch: Batch, there: torch.cuda.Event) -> Batch:
    """The batch, once the stream of the model may use it."""
    stream = torch.cuda.current_stream(batch.labels.device)
    stream.wait_event(there)
    rows = batch.teacher
    for part in (batch.images, batch.labels, *(rows.parts if rows else ())):
        # Its memory may be given to the next batch only when the model's stream is past it.
        part.record_stream(stream)
    return batch


def _leave_signals_to_main(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
