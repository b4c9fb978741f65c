"""Range variants of asymmetric numeral systems: one coder a row, all rows of a batch in step.

A symbol of frequency f out of M = 2^11, with c the sum of the frequencies of smaller symbols, goes into the state x by

    x' = (x // f) M + c + x mod f    and out again by    slot = x' mod M,  x = f (x' // M) + slot - c

and b raw bits as one of 2^b equal symbols. Before a number of frequency f and B bits (11 and its raw ones) goes in,
one word of 32 bits leaves where x >= f 2^(63 - B); after it came out, a word returns where x < 2^31 and one is left.
A row starts at x = 0, so that what is coded first costs its own bits only, and ends with the bytes of x.

Paper: Duda 2013, arXiv:1311.2540.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

PRECISION = 11
TOTAL = 1 << PRECISION
WORD, STATE = 32, 63
LOW = 1 << STATE - WORD
"""A state below it takes up a word."""
DIRECT = 32
"""Numbers below it are symbols themselves; from here on there are four symbols an octave, and raw bits."""
SYMBOLS = 96
"""Of numbers below 2^21."""
STRIDE_BITS = 7
STRIDE = 1 << STRIDE_BITS


def _numbers() -> tuple[Ints, Ints]:
    symbol = np.arange(SYMBOLS)
    raw = np.where(symbol < DIRECT, 0, 3 + (symbol - DIRECT) // 4)
    return np.where(symbol < DIRECT, symbol, (4 + symbol % 4) << raw), raw


FIRST, RAW = _numbers()
"""The smallest number of each symbol, and how many raw bits follow it."""
_SYMBOL: Ints = np.searchsorted(FIRST, np.arange(1 << 12), side="right") - 1


def symbols(numbers: NDArray[Any]) -> Ints:
    """The symbol of each number: itself below 32; then 4 e + 12 + b, 2^e its highest bit and b the two bits below."""
    found: Ints = _SYMBOL.take(numbers, mode="clip")
    large = numbers >= len(_SYMBOL)
    if large.any():
        found[large] = np.searchsorted(FIRST, numbers[large], side="right") - 1
    return found


def frequencies(counts: Ints) -> Ints:
    """Counts `[symbols]` in proportion, to a sum of 2^11, at least 1 each; the largest bear what rounding leaves.

    All in integers.
    """
    total = int(counts.sum())
    freq = np.where(counts > 0, np.maximum(1, (counts * TOTAL + total // 2) // total), 0)
    while (excess := int(freq.sum()) - TOTAL) != 0:
        largest = int(freq.argmax())
        freq[largest] -= min(excess, max(1, int(freq[largest]) // 4)) if excess > 0 else excess
    return freq


@dataclass(frozen=True)
class Tables:
    """Frequency tables, ready for decoding: 2^11 bytes and 2^7 words each."""

    symbol: NDArray[np.uint8]
    """`[tables * 2^11]`: of each slot."""
    step: NDArray[np.uint32]
    """`[tables * 2^7]`: of each symbol frequency, first slot and mark in 12, 11 and 2 bits, lowest first."""

    @classmethod
    def of(cls, freq: Ints, mark: Ints) -> "Tables":
        """
        Args:
            freq: `[tables, symbols]`, each of sum 2^11.
            mark: `[symbols]`, 0 to 3: what `Decoder.number` gives with a number.
        """
        step = np.zeros((len(freq), STRIDE), np.uint32)
        step[:, :SYMBOLS] = freq | (np.cumsum(freq, axis=1) - freq) << PRECISION + 1 | mark << 2 * PRECISION + 1
        every = np.tile(np.arange(SYMBOLS, dtype=np.uint8), len(freq))
        return cls(np.repeat(every, freq.ravel()), step.ravel())

    def __add__(self, other: "Tables") -> "Tables":
        return Tables(np.concatenate([self.symbol, other.symbol]), np.concatenate([self.step, other.step]))


class Decoder:
    """The states of a batch of rows. Reads nothing but a row's own bytes, whatever they are."""

    def __init__(self, tables: Tables, content: NDArray[np.uint8], length: Ints) -> None:
        """
        Args:
            content: `[rows, width]`, the bytes of each row, then zeros; width is a multiple of 4, >= max(length) + 8.
            length: `[rows]`, in bytes.
        """
        self.tables = tables
        words = content.view("<u4")
        self.left: Ints = np.where(length > 8, (length - 5) // 4, 0)
        self.start: Ints = np.arange(len(length)) * words.shape[1] - 1
        self.words = words.ravel()
        state = self.start + 1 + self.left
        self.state: Ints = self.words[state].astype(np.int64) | (self.words[state + 1].astype(np.int64) << WORD)
        self.state &= (1 << STATE) - 1

    def reorder(self, order: Ints) -> None:
        self.left, self.start, self.state = self.left[order], self.start[order], self.state[order]

    def number(self, base: Ints, first: Ints | None = None) -> tuple[Ints, Ints]:
        """The next number of the first `len(base)` rows, and with it the mark of its symbol, 2^11 times that.

        Args:
            base: the place of each row's slots, a multiple of 2^11.
            first: that of its steps, base / 16, where the caller has it already.
        """
        state = self.state[: len(base)]
        first = base >> PRECISION - STRIDE_BITS if first is None else first
        slot = state & (TOTAL - 1)
        number = self.tables.symbol.take(slot + base, mode="clip").astype(np.int64)
        step = self.tables.step.take(first + number, mode="clip").astype(np.int64)
        state >>= PRECISION
        state *= step & 4095
        state += slot
        step >>= PRECISION + 1
        state -= step & (TOTAL - 1)
        long = (number >= DIRECT).nonzero()[0]
        if len(long):
            raw, rest = RAW.take(number[long], mode="clip"), state[long]
            number[long] = FIRST.take(number[long], mode="clip") + (rest & ((1 << raw) - 1))
            state[long] = rest >> raw
        self._fill(state)
        return number, step

    def raw(self, bits: int) -> Ints:
        """The next number of so many raw bits of each row."""
        number: Ints = self.state & ((1 << bits) - 1)
        self.state >>= bits
        self._fill(self.state)
        return number

    def _fill(self, state: Ints) -> None:
        # `take` and a buffer are twice as fast here as indexing.
        rows = (state < LOW).nonzero()[0]
        left = self.left.take(rows, mode="clip")
        if left.size and not left.all():
            rows, left = rows[left > 0], left[left > 0]
        filled = state.take(rows, mode="clip")
        filled <<= WORD
        filled |= self.words.take(self.start.take(rows, mode="clip") + left, mode="clip")
        state[rows] = filled
        left -= 1
        self.left[rows] = left


class Encoder:
    """The states of rows that are being written; what is read last goes in first."""

    def __init__(self, rows: int, numbers: int) -> None:
        """
        Args:
            numbers: at most so many go into a row.
        """
        self.state: Ints = np.zeros(rows, np.int64)
        self.count: Ints = np.zeros(rows, np.int64)
        self.words: NDArray[np.uint32] = np.zeros((rows, numbers + 2), np.uint32)

    def number(self, freq: Ints, first: Ints, symbol: Ints, number: Ints) -> None:
        """Put a number into each of the first `len(number)` rows.

        Args:
            freq: of its symbol, and `first`, the sum of those of smaller symbols.
        """
        raw = RAW[symbol]
        state = self._room(freq, PRECISION + raw)
        quotient, remainder = np.divmod(state << raw | number - FIRST[symbol], freq)
        self.state[: len(number)] = (quotient << PRECISION) + first + remainder

    def raw(self, number: Ints, bits: int) -> None:
        """Put a number of so many raw bits into each row."""
        self.state = self._room(np.ones(len(number), np.int64), bits) << bits | number

    def _room(self, freq: Ints, bits: Ints | int) -> Ints:
        state = self.state[: len(freq)]
        full = np.flatnonzero(state >> (STATE - bits) >= freq)
        self.words[full, self.count[full]] = state[full] & ((1 << WORD) - 1)
        self.count[full] += 1
        state[full] >>= WORD
        return state

    def finish(self, order: Ints) -> tuple[Ints, NDArray[np.uint8]]:
        """Lengths `[rows]` in bytes, and the bytes of the rows in this order: words as written, then the state.

        Behind words the state has 5 to 8 bytes, so the length tells how many words there are.
        """
        size = sum((self.state >> 8 * place > 0).astype(np.int64) for place in range(8))
        size = np.where(self.count > 0, np.maximum(size, 5), size)
        rows = np.arange(len(self.state))
        for half in range(2):
            self.words[rows, self.count + half] = self.state >> WORD * half & ((1 << WORD) - 1)
        length = 4 * self.count + size
        content = self.words.astype("<u4", copy=False).view(np.uint8)
        length, content = length[order], content[order, : int(length.max())]
        return length, content[np.arange(content.shape[1]) < length[:, None]]
