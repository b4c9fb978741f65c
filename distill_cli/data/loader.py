"""Batches: which samples a step holds, and the processes that load them.

The content of a batch is a function of its number, so a loader can start anywhere, with any number of workers,
and nothing about it needs saving.
"""

import functools
import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from distill_cli.data.sources import Source, UnreadableImage
from distill_cli.data.views import Transform
from distill_cli.errors import DistillError
from distill_cli.randomness import derive, preserved
from distill_cli.sparse import SparseLogits

Rows = Callable[[int, NDArray[np.int64]], SparseLogits]
"""(view, sample ids) -> the teacher's rows: how a store gives them to the loader."""


@dataclass(frozen=True)
class Batch:
    images: Tensor
    """float32 `[batch, 3, height, width]`, normalised."""
    labels: Tensor
    """int64 `[batch]`; -1 where the data has no labels."""
    sample_ids: NDArray[np.int64]
    view: int
    teacher: SparseLogits | None = None
    skipped: tuple[str, ...] = ()
    """The messages of images that could not be decoded and are not in the batch."""
    probe_crc: tuple[int, ...] = ()
    """Checksums of its first images, where they were asked for."""

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            teacher=self.teacher and self.teacher.to(device),
        )

    def pin_memory(self) -> "Batch":
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            teacher=self.teacher and self.teacher.pin_memory(),
        )


ROWS_AHEAD = 8192
"""Rows of a store that are read at once, for several batches."""

Order = Callable[[int], tuple[int, NDArray[np.int64]]]
"""Batch number -> (view, sample ids)."""


@dataclass(frozen=True)
class TrainingOrder:
    """Samples shuffled by (seed, epoch) and cut into global batches, of which a rank takes its slice.

    Epoch e reads view e mod views. What does not fill a last batch waits for another epoch's shuffle. Of data in tars
    only so many are open at a time: see `windowed`.
    """

    sample_ids: NDArray[np.int64]
    batch_size: int
    """Global, over all ranks."""
    seed: int
    views: int
    rank: int = 0
    world_size: int = 1
    tars: tuple[int, ...] = ()
    """How many of `sample_ids` each tar has, one tar behind the other; none: the samples are in no tars."""
    window: int = 0
    """Tars that are open at a time; 0: all."""

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.sample_ids) // self.batch_size)

    @property
    def images_per_step(self) -> int:
        """Over all ranks."""
        return min(self.batch_size, len(self.sample_ids))

    def __call__(self, step: int) -> tuple[int, NDArray[np.int64]]:
        epoch, place = divmod(step, self.steps_per_epoch)
        shuffled = _permutation(derive("order", self.seed, epoch), len(self.sample_ids), self.tars, self.window)
        chosen = shuffled[place * self.batch_size : (place + 1) * self.batch_size]
        return epoch % self.views, self.sample_ids[np.array_split(chosen, self.world_size)[self.rank]]


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
def _permutation(seed: int, count: int, tars: tuple[int, ...], window: int) -> NDArray[np.int64]:
    drawn = np.random.default_rng(seed)
    return windowed(drawn, tars, window) if 0 < window < len(tars) else drawn.permutation(count)


def windowed(drawn: np.random.Generator, tars: Sequence[int], window: int) -> NDArray[np.int64]:
    """A shuffle of the samples of some tars in which no more than `window` tars are open at a time.

    The tars are put into a random order; tar j of it, from 0, opens at time j and has closed by time j + window, and
    each sample is drawn a time in between. So when the first sample of tar j comes, the last one of tar j - window is
    past, and a window slides from tar to tar, where blocks of tars would be fetched all at once. No time before
    window - 1 and after len(tars) is drawn, so that the first and last batches are of a whole window too.

    Args:
        tars: samples of each.
        window: from 1 to len(tars).
    """
    opens = drawn.permutation(len(tars))
    first, last = np.maximum(opens, window - 1), np.minimum(opens + window, len(tars))
    times = drawn.random(sum(tars))
    times *= np.repeat(last - first, tars)
    times += np.repeat(first, tars)
    return np.argsort(times, kind="stable")


@dataclass
class Batches(Dataset["Batch | DistillError"]):
    """Batch number -> batch. An error is handed over as a value: a worker's traceback would hide its one line."""

    source: Source
    transform: Transform
    order: Order
    seed: int = 0
    """Of the views."""
    drawn: Sequence[tuple[int, int]] | None = None
    """(seed, view) by which each view of a store is drawn, instead."""
    rows: Rows | None = None
    skip_unreadable: bool = False
    probes: int = 0
    """Images of each batch that are checksummed."""
    _ahead: dict[int, SparseLogits] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Rows of this process's next batches, by number."""

    def __getitem__(self, number: int) -> Batch | DistillError:
        try:
            return self.load(number)
        except DistillError as error:
            return error

    def load(self, number: int) -> Batch:
        view, wanted = self.order(number)
        images, ids, skipped = [], [], []
        for sample_id in wanted.tolist():
            try:
                images.append(self.source.read(sample_id))
            except UnreadableImage as error:
                if not self.skip_unreadable:
                    raise
                skipped.append(str(error))
                continue
            ids.append(sample_id)
        seed, drawn = self.drawn[view] if self.drawn else (self.seed, view)
        inputs = torch.empty(0)
        probe_crc: tuple[int, ...] = ()
        if images:
            with preserved():
                pixels = self.transform.draw(images, seed, drawn, ids)
            inputs = self.transform.inputs(pixels)
            probe_crc = tuple(map(pixels.checksum, range(min(self.probes, len(images)))))
        sample_ids = np.array(ids, np.int64)
        teacher = self._teacher(number, len(wanted)) if self.rows else None
        if teacher is not None and skipped:
            teacher = teacher.at(torch.from_numpy(np.flatnonzero(np.isin(wanted, sample_ids))))
        labels = np.full(len(ids), -1) if self.source.labels is None else self.source.labels[sample_ids]
        return Batch(
            images=inputs,
            labels=torch.from_numpy(labels),
            sample_ids=sample_ids,
            view=view,
            teacher=teacher,
            skipped=tuple(skipped),
            probe_crc=probe_crc,
        )

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
        for view, group in itertools.groupby(wanted, key=lambda item: item[1]):
            batches = [(number, ids) for number, _, ids in group]
            rows = self.rows(view, np.concatenate([ids for _, ids in batches]))
            ends = np.cumsum([len(ids) for _, ids in batches])
            for (number, ids), end in zip(batches, ends.tolist(), strict=True):
                # Copies: what is sent to another process is sent with all the memory that it is a part of.
                self._ahead[number] = rows.at(slice(end - len(ids), end)).clone()


def load(batches: Batches, numbers: Iterable[int], workers: int, device: torch.device) -> Iterator[Batch]:
    """Load the batches of these numbers, in order, ahead of use, onto a device.

    Args:
        workers: processes that load; 0 loads in this one.

    Raises:
        DistillError: what a batch met, or a worker that died.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_main,
    )
    loaded = iter(loader)
    try:
        while True:
            try:
                batch = next(loaded)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DistillError(f"{' '.join(str(error).split())} Run the same command again to go on") from error
            if isinstance(batch, DistillError):
                raise batch
            yield batch.to(device)
    finally:
        # An error holds this frame, and the frame the workers: let go of them here, not when garbage is collected.
        del loaded


def _leave_signals_to_main(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
