"""Batches by their number: read, drawn and given their rows.

The content of a batch is a function of its number, so whoever loads them can start anywhere, with any number of
workers, and nothing about it needs saving.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from distill_cli.data.batch import Batch, MixedLabels
from distill_cli.data.mixing import Mix, Partners
from distill_cli.data.orders import Order
from distill_cli.data.pixels import Mixture, Pixels
from distill_cli.data.sources import Source, UnreadableImage
from distill_cli.data.tensors import Undecoded
from distill_cli.data.views import Transform, empty_bytes
from distill_cli.errors import DistillError
from distill_cli.randomness import preserved
from distill_cli.sparse import SparseLogits, stacked
from distill_cli.store.dealing import Dealing, Following
from distill_cli.store.plan import PROBES

Rows = Callable[[int, NDArray[np.int64]], SparseLogits]
"""(view, sample ids) -> the teacher's rows: how a store gives them."""
ROWS_AHEAD = 8192
"""Rows of a store that are read at once, for several batches."""

AHEAD = 2
"""Batches that a loader process is ahead of use: torch's `prefetch_factor`."""


@dataclass(frozen=True)
class Loaded:
    """A batch as a loader process hands it over: its images are still the bytes that were drawn."""

    batch: Batch
    """Its `images` are empty."""
    pixels: Pixels | Undecoded | None
    """None where no image could be decoded."""
    places: NDArray[np.int64] | None = None
    """Of samples that a GPU is to decode: by which the first are checksummed; None: they need no checksum."""
    skip_unreadable: bool = False

    def to(self, device: torch.device) -> "Loaded":
        """
        Raises:
            UnreadableImage: an image that is decoded there cannot be, and is not to be skipped.
        """
        here = self._decoded(self.pixels, device) if isinstance(self.pixels, Undecoded) else self
        return here._each(lambda part: part.to(device, non_blocking=True), lambda part: part.to(device))

    def pin_memory(self) -> "Loaded":
        return self._each(Tensor.pin_memory, lambda part: part.pin_memory())

    def _each(self, tensor: Callable[[Tensor], Tensor], other: Callable[[Any], Any]) -> "Loaded":
        batch, pixels = self.batch, self.pixels
        teacher, mixed = batch.teacher and other(batch.teacher), batch.mixed and other(batch.mixed)
        moved = replace(batch, labels=tensor(batch.labels), teacher=teacher, mixed=mixed)
        return replace(self, batch=moved, pixels=pixels and other(pixels))

    def _decoded(self, undecoded: Undecoded, device: torch.device) -> "Loaded":
        pixels, unreadable = undecoded.made(device)
        if unreadable and not self.skip_unreadable:
            raise next(iter(unreadable.values()))
        batch, places = self.batch, self.places
        if unreadable:
            batch = batch.without(unreadable)
            places = None if places is None else np.delete(places, list(unreadable))
        if places is not None:
            ids = batch.sample_ids[: len(places)]
            batch = replace(batch, probe_crc=checksums(ids, places, pixels, {}, ids.tolist()))
        return Loaded(batch, pixels if len(batch) else None)

    def finished(self, transform: Transform) -> Batch:
        """The batch with its images, made where the pixels are."""
        assert not isinstance(self.pixels, Undecoded)
        return self.batch if self.pixels is None else replace(self.batch, images=transform.inputs(self.pixels))


def checksums(
    sample_ids: NDArray[np.int64],
    places: NDArray[np.int64],
    pixels: Pixels,
    mixes: Mapping[int, Mix],
    drawn: Sequence[int],
) -> dict[int, int]:
    """By sample id, of those of a batch that come first by place.

    Args:
        drawn: the samples of the pixels' images, in their order.
    """
    found = {}
    for sample_id in sample_ids[np.argsort(places)[:PROBES]].tolist():
        crc = pixels.checksum(drawn.index(sample_id))
        found[sample_id] = mixes[sample_id].checksum(crc) if sample_id in mixes else crc
    return found


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
    partners: Partners | None = None
    """Given if and only if the transform mixes. A partner that a batch lacks is read in addition."""
    probes: Dealing | Following | None = None
    """Of whose places the images are checksummed that come first in a batch."""
    with_content_crc: bool = False
    """What images are decoded from is checksummed, in batches of view 0."""
    _ahead: dict[int, SparseLogits] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Rows of this process's next batches, by number."""
    _shared: SharedBytes = field(default_factory=SharedBytes, init=False, repr=False, compare=False)

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
            UnreadableImage: an image, or the partner of one, cannot be decoded, and is not to be skipped.
        """
        assert (self.transform.mixing is None) == (self.partners is None), "only what mixes needs partners"
        first, wanted = self.order(number)
        views = self._views(first)
        with preserved():
            mixes = [self._mixes(view, wanted) for view in views]
            others = (mix.partner for of in mixes for mix in of.values())
            read = self._read([*wanted.tolist(), *others], views, self.with_content_crc and first == 0)
        if self.partners is not None and not self.partners.final:
            # Whose partner cannot be read stays as it is.
            mixes = [{i: mix for i, mix in of.items() if mix.partner not in read.unreadable} for of in mixes]
        ids, skipped = _whole(wanted.tolist(), mixes, read.unreadable)
        sample_ids = np.array(ids, np.int64)
        teacher = self._teacher(number, len(wanted)) if self.rows else None
        if teacher is not None and skipped:
            kept = np.tile(np.isin(wanted, sample_ids), len(views))
            teacher = teacher.at(torch.from_numpy(np.flatnonzero(kept)))
        pixels = read.pixels if ids else None
        places = None if self.probes is None else self.probes.place(sample_ids)
        probe_crc: dict[int, int] = {}
        if isinstance(pixels, Pixels):
            if places is not None:
                probe_crc = checksums(sample_ids, places, pixels, mixes[0], read.ids)
            if self.partners is not None:
                pixels = replace(pixels, mixture=Mixture.of(read.ids, ids, mixes))
        batch = Batch(
            images=torch.empty(0),
            labels=torch.from_numpy(np.tile(self._labels(sample_ids), len(views))),
            sample_ids=np.tile(sample_ids, len(views)),
            views=views,
            teacher=teacher,
            skipped=tuple(skipped),
            probe_crc=probe_crc,
            mixed=None if self.partners is None else self._mixed_labels(ids, mixes),
            content_crc={sample_id: read.content_crc[sample_id] for sample_id in ids} if read.content_crc else {},
        )
        return Loaded(batch, pixels, None if isinstance(pixels, Pixels) else places, self.skip_unreadable)

    def _views(self, first: int) -> tuple[int, ...]:
        views = range(first, first + self.views_per_read)
        return tuple(view % len(self.drawn) for view in views) if self.drawn else tuple(views)

    def _drawn(self, view: int) -> tuple[int, int]:
        """(seed, view) by which a view is drawn."""
        return self.drawn[view] if self.drawn else (self.seed, view)

    def _mixes(self, view: int, wanted: NDArray[np.int64]) -> dict[int, Mix]:
        """What is mixed into those of some samples that are mixed with another."""
        if self.partners is None or self.transform.mixing is None:
            return {}
        seed, drawn = self._drawn(view)
        pairs = zip(wanted.tolist(), self.partners(view, wanted).tolist(), strict=True)
        mixes = {sample_id: self.transform.mixing(seed, drawn, sample_id, partner) for sample_id, partner in pairs}
        return {sample_id: mix for sample_id, mix in mixes.items() if mix is not None}

    def _read(self, wanted: Iterable[int], views: Sequence[int], with_crc: bool) -> "_Read":
        """Read, and draw, each of some samples once."""
        each = list(dict.fromkeys(wanted))
        drawing = self.transform.drawing(len(each), len(views), self._shared.empty)
        drawn = [self._drawn(view) for view in views]
        ids, unreadable, content_crc = list[int](), dict[int, str](), dict[int, int]()
        for sample_id in each:
            try:
                image, crc = self.transform.fetch(self.source, sample_id, with_crc)
                drawing.add(image, drawn, sample_id)
            except UnreadableImage as error:
                if not self.skip_unreadable:
                    raise
                unreadable[sample_id] = str(error)
                continue
            ids.append(sample_id)
            if crc is not None:
                content_crc[sample_id] = crc
        return _Read(drawing.drawn() if ids else None, ids, unreadable, content_crc)

    def _labels(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        labels = self.source.labels
        return np.full(len(sample_ids), -1) if labels is None else labels[sample_ids]

    def _mixed_labels(self, ids: list[int], mixes: Sequence[dict[int, Mix]]) -> MixedLabels:
        rows = [(sample_id, of.get(sample_id)) for of in mixes for sample_id in ids]
        partners = np.array([mix.partner if mix else sample_id for sample_id, mix in rows], np.int64)
        lam = torch.tensor([mix.lam if mix else 1.0 for _, mix in rows])
        return MixedLabels(torch.from_numpy(self._labels(partners)), lam)

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


@dataclass(frozen=True)
class _Read:
    """What was read and drawn for a batch, and for partners that it lacks."""

    pixels: Pixels | Undecoded | None
    ids: list[int]
    """Whose images these are, in their order; in each of the views."""
    unreadable: dict[int, str]
    content_crc: dict[int, int]


def _whole(
    wanted: Iterable[int], mixes: Sequence[dict[int, Mix]], unreadable: Mapping[int, str]
) -> tuple[list[int], list[str]]:
    """The samples of which all can be read that is needed, their partners too, and what is said of the others."""
    ids, skipped = [], []
    for sample_id in wanted:
        needed = (sample_id, *(of[sample_id].partner for of in mixes if sample_id in of))
        failed = next((number for number in needed if number in unreadable), None)
        if failed is None:
            ids.append(sample_id)
        else:
            skipped.append(unreadable[failed])
    return ids, skipped
