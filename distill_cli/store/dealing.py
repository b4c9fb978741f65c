"""Which sample lies in which shard: dealt by a fixed permutation that is computed, neither stored nor searched; or in
the order of the listing, a shard for each of its parts. Both kinds answer the same questions."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

ROUNDS = 4
GAMMA = 0x9E3779B97F4A7C15
"""The step of SplitMix64."""


@dataclass(frozen=True)
class Dealing:
    """How samples are dealt to shards: a fixed permutation gives each sample its place; shards are runs of places.

    The permutation is a Feistel network of four rounds over the smallest 2^b >= samples, walked until it falls below
    `samples`. It looks random to any listing, sorted by class or periodic, so that each shard is a fair sample,
    and either direction is arithmetic: nothing has to be stored or searched.
    """

    samples: int
    shard_rows: int

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_rows)

    @property
    def largest(self) -> int:
        """Places that no shard has more of."""
        return self.shard_rows

    def place(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each sample."""
        return self._walk(sample_ids, range(ROUNDS))

    def shard_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard of each place."""
        return places // self.shard_rows

    def places(self, shard: int) -> range:
        """The places of one shard; its length is the shard's, with no sample to be looked for."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.samples))

    def sample_ids(self, shard: int) -> NDArray[np.int64]:
        """The samples of one shard, by place."""
        return self.at(np.array(self.places(shard), np.int64))

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample at each place: the inverse of `place`."""
        return self._walk(places, range(ROUNDS - 1, -1, -1))

    def _walk(self, numbers: NDArray[np.int64], rounds: range) -> NDArray[np.int64]:
        out = self._permute(numbers.astype(np.int64), rounds)
        outside = np.flatnonzero(out >= self.samples)
        while len(outside):
            out[outside] = again = self._permute(out[outside], rounds)
            outside = outside[again >= self.samples]
        return out

    def _permute(self, numbers: NDArray[np.int64], rounds: range) -> NDArray[np.int64]:
        low = self._widths[1]
        left, right = numbers >> low, numbers & (1 << low) - 1
        for number in rounds:
            if rounds.step > 0:
                left, right = right, left ^ self._function(right, number)
            else:
                left, right = right ^ self._function(left, number), left
        return (left << low) | right

    @cached_property
    def _widths(self) -> tuple[int, int]:
        """Bits of the left and of the right half."""
        bits = max(2, (self.samples - 1).bit_length())
        return bits // 2, bits - bits // 2

    def _function(self, values: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """The round function, from a table of all its values where that is small: up to 2^32 samples, 2 MiB."""
        if self._widths[1] > 16:
            return self._value(values, number)
        found: NDArray[np.int64] = self._table[number].take(values)
        return found

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        return np.stack([self._value(np.arange(1 << self._widths[1]), number) for number in range(ROUNDS)])

    def _value(self, values: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        # The halves take turns: in even rounds it is the left one that is changed.
        scrambled = _scramble(values.astype(np.uint64) + np.uint64((number + 1) * GAMMA % 2**64))
        return scrambled.view(np.int64) & (1 << self._widths[number % 2]) - 1


@dataclass(frozen=True)
class Following:
    """Shards that follow the parts of a listing, such as tars: a sample's place is its id, shard i has part i."""

    sizes: tuple[int, ...]
    """Samples of each part, at least one."""

    @property
    def shards(self) -> int:
        return len(self.sizes)

    @property
    def largest(self) -> int:
        """Places that no shard has more of."""
        return max(self.sizes)

    def place(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each sample."""
        return sample_ids

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample of each place."""
        return places

    def shard_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard of each place."""
        return np.searchsorted(self._ends, places, side="right")

    def places(self, shard: int) -> range:
        """The places of one shard."""
        end = int(self._ends[shard])
        return range(end - self.sizes[shard], end)

    def sample_ids(self, shard: int) -> NDArray[np.int64]:
        """The samples of one shard, by place."""
        places = self.places(shard)
        return np.arange(places.start, places.stop)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.sizes, dtype=np.int64)


def splitmix(seed: int, count: int) -> NDArray[np.uint64]:
    """The first numbers of SplitMix64 seeded by `seed`, all of them different."""
    return _scramble(np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA))


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64, modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
