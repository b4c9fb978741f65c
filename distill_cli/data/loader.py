"""The processes that load batches, ahead of use, and their way onto the device."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill_cli.data.batch import Batch
from distill_cli.data.batches import AHEAD, Batches, Loaded
from distill_cli.data.pixels import Pixels
from distill_cli.data.views import Transform
from distill_cli.errors import DistillError

T = TypeVar("T")


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
        self._loader: DataLoader[Loaded | DistillError] | None = _processes(
            batches, numbers, workers, pin_memory=device.type == "cuda", persistent=True
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


def in_workers(dataset: "Dataset[T | DistillError]", numbers: Iterable[int], workers: int) -> Generator[T]:
    """What a data set has at these numbers, in order, ahead of use.

    Args:
        workers: processes that load; 0 loads in this one.

    Raises:
        DistillError: what the data set hands over as such, or a worker that died.
    """
    loaded = _checked(iter(_processes(dataset, numbers, workers)))
    try:
        yield from loaded
    finally:
        loaded.close()
        del loaded


def _processes(
    dataset: "Dataset[T]", numbers: Iterable[int], workers: int, pin_memory: bool = False, persistent: bool = False
) -> "DataLoader[T]":
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        worker_init_fn=_begin_worker,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=AHEAD if workers else None,
    )


def _as_it_is(item: T) -> T:
    # torch's own would make a tensor of an array.
    return item


def _checked(loaded: "Iterator[T | DistillError]") -> Generator[T]:
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
    rows, mixed = batch.teacher, batch.mixed
    labels = (batch.labels, *((mixed.partner, mixed.lam) if mixed else ()))
    for part in (batch.images, *labels, *(rows.parts if rows else ())):
        # Its memory may be given to the next batch only when the model's stream is past it.
        part.record_stream(stream)
    return batch


def _begin_worker(worker: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and multiprocessing.get_start_method() == "fork" and os.getppid() != parent.pid:
        # It was killed before torch began to watch it, and torch would watch whoever it has now, for ever.
        os._exit(1)
    # Ctrl-C reaches the whole process group; the main process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
