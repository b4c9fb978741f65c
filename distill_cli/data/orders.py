"""Which samples a batch holds, as a function of its number: shuffled for training, in turn for evaluation."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from distill_cli.data.mixing import Partners, together
from distill_cli.randomness import derive

Order = Callable[[int], tuple[int, NDArray[np.int64]]]
"""Batch number -> (view, sample ids)."""


@dataclass(frozen=True)
class TrainingOrder:
    """Samples shuffled by (seed, pass) and cut into global batches, of which a rank takes its slice.

    With one view a read a pass is an epoch, and epoch e reads view e mod views. With N a pass is N epochs: a sample is
    read once in it and seen by N views in the same step, so that an epoch has as many steps as ever. What does not
    fill a last batch waits for another pass's shuffle. Of data in tars only so many are open at a time: see `windowed`.
    Samples that are mixed, in the first of the views, follow each other.

    Paper: Shen and Xing 2022, arXiv:2112.01528 (FKD's several crops of an image in one mini-batch).
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
    tars: tuple[int, ...] = ()
    """How many of `sample_ids` each tar has, one tar behind the other; none: the samples are in no tars."""
    window: int = 0
    """Tars that are open at a time; 0: all."""
    partners: Partners | None = None
    _paired: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The samples in the order of the last passes, by number."""

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.sample_ids) // self.images_per_step)

    @property
    def images_per_step(self) -> int:
        """Inputs, over all ranks."""
        return self.samples_per_step * self.views_per_read

    def _shuffled(self, number: int, view: int) -> NDArray[np.int64]:
        """The samples in the order of a pass that begins with a view."""
        seed = derive("order", self.seed, number)
        shuffled = _permutation(seed, len(self.sample_ids), self.tars, self.window)
        if self.partners is None:
            return self.sample_ids[shuffled]
        if number not in self._paired:
            for before in list(self._paired)[:-1]:
                del self._paired[before]
            ids = self.sample_ids[shuffled]
            self._paired[number] = together(ids, self.partners(view, ids))
        return self._paired[number]

    @property
    def samples_per_step(self) -> int:
        """Over all ranks; each is seen by `views_per_read` views."""
        return min(self.batch_size // self.views_per_read, len(self.sample_ids))

    @property
    def _steps_per_pass(self) -> int:
        epochs = self.views_per_read * (len(self.sample_ids) // self.images_per_step)
        return epochs or len(self.sample_ids) // self.samples_per_step

    def __call__(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """(first view, samples)."""
        number, place = divmod(step, self._steps_per_pass)
        first = number * self.views_per_read % self.views
        shuffled = self._shuffled(number, first)
        chosen = shuffled[place * self.samples_per_step : (place + 1) * self.samples_per_step]
        return first, np.array_split(chosen, self.world_size)[self.rank]


@dataclass(frozen=True)
class ListingOrder:
    """Every sample once, in the order of the listing, dealt to ranks in turn; its view is 0.

    Samples that are mixed follow each other, and are dealt two by two.
    """

    sample_ids: NDArray[np.int64]
    batch_size: int
    rank: int = 0
    world_size: int = 1
    partners: Partners | None = None

    @property
    def batches(self) -> int:
        """How many batches this rank has."""
        return -(-len(self._mine) // self.batch_size)

    def __call__(self, number: int) -> tuple[int, NDArray[np.int64]]:
        return 0, self._mine[number * self.batch_size : (number + 1) * self.batch_size]

    @functools.cached_property
    def _mine(self) -> NDArray[np.int64]:
        if self.partners is None:
            return self.sample_ids[self.rank :: self.world_size]
        ids = together(self.sample_ids, self.partners(0, self.sample_ids))
        return ids[np.arange(len(ids)) // 2 % self.world_size == self.rank]


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
