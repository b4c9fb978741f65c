"""How samples are dealt to shards: a fixed permutation that is computed, neither stored nor searched."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 4


@dataclass(frozen=True)
class Dealing:
    """How samples are dealt to shards: a fixed permutation gives each sample its place; shards are runs of places.

    The permutation is a Feistel network of four rounds over the smallest 2^(2h) >= samples, walked until it falls
    below `samples`. It looks random to any listing, sorted by class or periodic, so that each shard is a fair sample,
    and either direction is arithmetic: nothing has to be stored or searched.
    """

    samples: int
    shard_rows: int

    def place(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each sample; `place // shard_rows` is its shard."""
        return self._walk(sample_ids, range(ROUNDS))

    def places(self, shard: int) -> range:
        """The places of one shard; its length is the shard's, with no sample to be looked for."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.samples))

    def sample_ids(self, shard: int) -> NDArray[np.int64]:
        """The samples of one shard, by place."""
        return self._walk(np.array(self.places(shard), np.int64), range(ROUNDS - 1, -1, -1))

    def _walk(self, numbers: NDArray[np.int64], rounds: range) -> NDArray[np.int64]:
        forward = rounds.step > 0
        out = self._permute(numbers.astype(np.uint64), rounds, forward)
        while (outside := out >= self.samples).any():
            out[outside] = self._permute(out[outside], rounds, forward)
        return out.astype(np.int64)

    def _permute(self, numbers: NDArray[np.uint64], rounds: range, forward: bool) -> NDArray[np.uint64]:
        half = np.uint64(max(1, -(-(self.samples - 1).bit_length() // 2)))
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = (numbers >> half) & mask, numbers & mask
        for number in rounds:
            if forward:
                left, right = right, left ^ (_scramble(right, number) & mask)
            else:
                left, right = right ^ (_scramble(left, number) & mask), left
        return (left << half) | right


def _scramble(values: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64, modulo 2^64, of `value + (number + 1) * 0x9E3779B97F4A7C15`."""
    values = values + np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
