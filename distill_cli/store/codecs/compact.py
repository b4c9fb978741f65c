"""The codec `compact`: rows of their own length, a quarter of the codec `exact`, decoded by the batch.

map      uint8    [75]        the frequency table of each context
symbols  uint8    [tables]    how many symbols each table has
freq     uint16   [sum]       of 2^11, table by table
centre   uint16   [16]        where in the cells of the lowest levels their probabilities lie
length   uint8 | uint16 | uint32 [n]   bytes of each row
rows     uint8    [sum]       the rows

**Values.** p is coded as the level round(q p^0.4) with q = 9 * 2^(bits - 3), at least 1 where p > 0; 0 is p = 0.
Steps uniform in p^0.5 are the best at T = 1, for KL = sum p (d log p)^2 / 2; 0.4 has the same bytes and KL there, and
40 % less KL at T = 2 and 4. The most probable class is what the others and the tail leave of 1, if that is near enough.

**Entries** go by class id, as gaps. The smallest level of a row comes first: it says how flat the row is, and is the
context of all others, which are coded as what they exceed it by. The context of a gap is the two gaps before it.

**Coder.** `distill_cli.store.codecs.rans`, one a row, frequencies of the shard. docs/store-format.md has every number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from distill_cli.store.codecs.numbers import (
    CENTRES,
    CONTEXTS,
    COUNT,
    GAP,
    LEAST,
    LEVEL,
    MAX_CLASSES,
    TAIL,
    TAIL_RAW,
    TAIL_STEPS,
    TOP,
    Numbers,
    gap_sizes,
    level_log_prob,
    row_class_of,
    scale_of,
)
from distill_cli.store.codecs.rans import (
    PRECISION,
    STRIDE_BITS,
    SYMBOLS,
    TOTAL,
    Decoder,
    Encoder,
    Ints,
    Tables,
    frequencies,
)
from distill_cli.store.codecs.rans import symbols as symbols_of
from distill_cli.store.rows import RowFormat, Rows

NAMES = ("map", "symbols", "freq", "centre", "length", "rows")
ENOUGH = 2048
"""Numbers that a context needs for a table of its own."""
ID_BITS = 18
PADDING = (1 << 14) - 1
"""Behind all levels."""
CACHED = 256
"""Rows that are sorted at a time."""
ARENA = 1024
"""Shards whose tables are kept side by side."""


@dataclass(frozen=True, eq=False)
class Opened:
    """One shard."""

    start: Ints
    """`[n + 1]`: where each row begins; the last is where they end."""
    rows: NDArray[np.uint8]
    window: NDArray[np.uint8]
    """`[places, width]`: `rows` from each place on, as wide as the decoder wants of the longest row."""
    table: NDArray[np.uint8]
    """`[contexts]`."""
    freq: NDArray[np.uint16]
    """`[tables, symbols]`."""
    log_prob: NDArray[np.float32]
    """`[levels]`, from the highest level to 0, behind a place for what is not there."""


def encode(rows: Rows, form: RowFormat) -> dict[str, NDArray[Any]]:
    """The datasets of one shard; equal rows give equal bytes.

    Raises:
        ValueError: a row has a class twice, or one that the format does not allow.
    """
    _check_form(form)
    numbers = Numbers.of(rows, form)
    counts = numbers.counts()
    table, freq = _tables(counts)
    length, content = _code(numbers, table, freq, form)
    used = [int(np.flatnonzero(row)[-1]) + 1 for row in freq]
    widest = int(length.max(initial=0))
    return {
        "map": table.astype("u1"),
        "symbols": np.array(used, "u1"),
        "freq": np.concatenate([row[:size] for row, size in zip(freq, used, strict=True)]).astype("<u2"),
        "centre": numbers.centre.astype("<u2"),
        "length": length.astype("u1" if widest < 1 << 8 else "<u2" if widest < 1 << 16 else "<u4"),
        "rows": content,
    }


def open(datasets: Mapping[str, NDArray[Any]], n: int, form: RowFormat) -> Opened:
    """Open the datasets of one shard of n rows, which may hold anything.

    Raises:
        ValueError: they do not fit each other, or the format.
    """
    _check_form(form)
    if missing := [name for name in NAMES if name not in datasets]:
        raise ValueError(f"{missing[0]} is missing")
    table, used, freq, centre, length, content = (datasets[name] for name in NAMES)
    items = {"map": CONTEXTS, "centre": CENTRES, "length": n}
    for name, kinds in zip(NAMES, ("1", "1", "2", "2", "124", "1"), strict=True):
        data = datasets[name]
        if data.dtype.kind != "u" or str(data.dtype.itemsize) not in kinds or data.ndim != 1:
            raise ValueError(f"{name} is {data.dtype} {list(data.shape)}")
        if len(data) != items.get(name, len(data)):
            raise ValueError(f"{name} has {len(data)} items, not {items[name]}")
    if not len(used) or int(table.max()) >= len(used) or not 1 <= int(used.min()) <= int(used.max()) <= SYMBOLS:
        raise ValueError("map and symbols do not fit each other")
    if int(used.sum(dtype=np.int64)) != len(freq):
        raise ValueError(f"freq has {len(freq)} items, symbols asks for {int(used.sum(dtype=np.int64))}")
    dense = np.zeros((len(used), SYMBOLS), np.int64)
    dense[np.arange(SYMBOLS) < used[:, None]] = freq
    if (dense.sum(axis=1) != TOTAL).any():
        raise ValueError("the frequencies of a table do not sum to 2048")
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(length, dtype=np.int64)])
    if int(start[-1]) != len(content):
        raise ValueError(f"rows has {len(content)} bytes, length asks for {int(start[-1])}")
    if int(length.max(initial=0)) > 6 * (form.width + 3) + 8:
        raise ValueError(f"a row of {int(length.max())} bytes cannot be of {form.width} entries")
    log_prob = np.concatenate([np.zeros(1, np.float32), level_log_prob(form, centre)[::-1]])
    width = (int(length.max(initial=0)) + 11) // 4 * 4
    window = sliding_window_view(content, width) if len(content) >= width else np.zeros((0, width), np.uint8)
    return Opened(start, content, window, table, dense.astype(np.uint16), log_prob)


def take(
    parts: Sequence[tuple[Opened, NDArray[np.int64]]], form: RowFormat
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32], Ints | None]:
    """Rows of several shards, decoded as one batch: (class_id, log_prob, log_tail, count), part by part.

    Raises:
        ValueError: the bytes of a row are damaged, where that shows.
    """
    total = sum(len(at) for _, at in parts)
    class_id = np.zeros((total, form.width), np.uint16 if form.num_classes <= 2**16 - 1 else np.uint32)
    log_prob = np.empty((total, form.width), np.float32)
    log_tail = np.empty(total, np.float32)
    count = np.full(total, form.width, np.int64)
    if total:
        arena = _arena([opened for opened, _ in parts], gap_sizes(form))
        shard = np.repeat([arena.place[opened] for opened, _ in parts], [len(at) for _, at in parts])
        length = np.concatenate([opened.start[at + 1] - opened.start[at] for opened, at in parts])
        content = _gather(parts, length)
        block = _block(form)
        for begin in range(0, total, block):
            rows = slice(begin, begin + block)
            ids, falling, log_tail[rows], count[rows] = _decode(arena, shard[rows], content[rows], length[rows], form)
            first = shard[rows] * (scale_of(form) + 2)
            for some in range(0, ids.shape[1], CACHED):
                part, into = slice(some, some + CACHED), slice(begin + some, min(begin + some + CACHED, begin + block))
                found = _sorted(ids[:, part], falling[:, part], log_tail[into], arena.log_prob, first[part])
                class_id[into], log_prob[into] = found
    return class_id, log_prob, log_tail, count if form.ragged else None


def _block(form: RowFormat) -> int:
    """Rows that are coded at a time: what a few vectors of them take fits a cache, and what they decode to a memory."""
    return max(16, min(1 << 14, (1 << 21) // form.width))


def _check_form(form: RowFormat) -> None:
    if not (1 <= form.width <= form.num_classes <= MAX_CLASSES and 4 <= form.bits <= 10):
        raise ValueError(f"compact cannot hold {form.width} of {form.num_classes} classes at {form.bits} bits")


# Tables and bytes


def _tables(counts: Ints) -> tuple[Ints, Ints]:
    """The table of each context, and the frequencies `[tables, symbols]`; poor contexts share one with neighbours."""
    table = np.zeros(CONTEXTS, np.int64)
    sums: list[Ints] = []
    for begin, end in zip((COUNT, LEAST, GAP, LEVEL, TAIL), (LEAST, GAP, LEVEL, TAIL, CONTEXTS), strict=True):
        first, pending = len(sums), np.zeros(SYMBOLS, np.int64)
        for context in range(begin, end):
            table[context] = len(sums)
            pending = pending + counts[context]
            if pending.sum() >= ENOUGH:
                sums.append(pending)
                pending = np.zeros(SYMBOLS, np.int64)
        if pending.any() and len(sums) > first:
            sums[-1] = sums[-1] + pending
        elif pending.any():
            sums.append(pending)
        table[begin:end] = np.minimum(table[begin:end], max(len(sums) - 1, 0))
    if not sums:
        sums.append(np.eye(1, SYMBOLS, dtype=np.int64)[0])
    return table, np.stack([frequencies(row) for row in sums])


def _code(numbers: Numbers, table: Ints, freq: Ints, form: RowFormat) -> tuple[Ints, NDArray[np.uint8]]:
    """Lengths, and the bytes of all rows."""
    first = np.cumsum(freq, axis=1) - freq

    def put(context: NDArray[Any], number: Ints) -> None:
        symbol, row = symbols_of(number), table[context]
        coder.number(freq[row, symbol], first[row, symbol], symbol, number)

    n, block, parts = len(numbers.count), _block(form), []
    for begin in range(0, n, block):
        order = np.argsort(-numbers.count[begin : begin + block], kind="stable")
        at = begin + order
        count, least, tail = numbers.count[at], numbers.least[at], numbers.tail[at]
        row_class = row_class_of(least)
        coder = Encoder(len(at), 2 * int(count[0]) + 4)
        coder.raw(tail & ((1 << TAIL_RAW) - 1), TAIL_RAW)
        put(TAIL + row_class, tail >> TAIL_RAW)
        for place in range(int(count[0]) - 1, -1, -1):
            live = at[: int(np.searchsorted(-count, -place))]
            put(LEVEL + row_class[: len(live)], numbers.level[place][live].astype(np.int64))
            put(numbers.gap_context[place][live], numbers.gap[place][live].astype(np.int64))
        put(np.full(len(at), LEAST), least)
        if form.ragged:
            put(np.full(len(at), COUNT), count - 1)
        parts.append(coder.finish(np.argsort(order)))
    return (
        np.concatenate([np.zeros(0, np.int64), *(length for length, _ in parts)]),
        np.concatenate([np.zeros(0, np.uint8), *(content for _, content in parts)]),
    )


@dataclass(frozen=True)
class _Arena:
    """The tables of many shards side by side."""

    place: WeakKeyDictionary[Opened, int]
    """Of a shard among them."""
    mark: Ints
    base: Ints
    """`[shards * contexts]`: where the slots of the table of each begin."""
    tables: Tables
    log_prob: NDArray[np.float32]
    """`[shards * levels]`."""

    @classmethod
    def of(cls, shards: list[Opened], mark: Ints) -> "_Arena":
        if len({len(each.log_prob) for each in shards}) > 1:
            raise ValueError("shards of other bits beside each other")
        begin = np.cumsum([0, *(len(each.freq) for each in shards)])[:-1, None]
        return cls(
            WeakKeyDictionary({each: number for number, each in enumerate(shards)}),
            mark,
            ((np.stack([each.table for each in shards]) + begin) << PRECISION).ravel(),
            Tables.of(np.concatenate([each.freq for each in shards]).astype(np.int64), mark),
            np.concatenate([each.log_prob for each in shards]),
        )

    def grows_by(self, new: list[Opened], mark: Ints) -> bool:
        """Whether shards can stand beside these."""
        shards = len(self.base) // CONTEXTS
        alike = all(len(each.log_prob) * shards == len(self.log_prob) for each in new)
        return alike and np.array_equal(mark, self.mark) and shards + len(new) <= ARENA

    def __add__(self, other: "_Arena") -> "_Arena":
        shards = len(self.base) // CONTEXTS
        return _Arena(
            WeakKeyDictionary({**self.place, **{each: shards + number for each, number in other.place.items()}}),
            self.mark,
            np.concatenate([self.base, other.base + len(self.tables.symbol)]),
            self.tables + other.tables,
            np.concatenate([self.log_prob, other.log_prob]),
        )


_last: _Arena | None = None


def _arena(wanted: list[Opened], mark: Ints) -> _Arena:
    """That of the last batch if it has these shards, for shuffled batches ask for the same ones again and again.

    One that lacks a few grows; one that lacks more than half, as in reading shard after shard, is dropped.
    """
    global _last
    arena, every = _last, list(dict.fromkeys(wanted))
    new = [each for each in every if arena is None or each not in arena.place]
    if arena is None or 2 * len(new) > len(every) or not arena.grows_by(new, mark):
        arena = _Arena.of(every, mark)
    elif new:
        arena = arena + _Arena.of(new, mark)
    _last = arena
    return arena


def _gather(parts: Sequence[tuple[Opened, NDArray[np.int64]]], length: Ints) -> NDArray[np.uint8]:
    """The bytes of each row, then zeros: `[rows, width]`."""
    width = max(opened.window.shape[1] for opened, _ in parts)
    content = np.zeros((len(length), width), np.uint8)
    end = 0
    for opened, at in parts:
        into = content[end : (end := end + len(at)), : opened.window.shape[1]]
        start = opened.start[at]
        inside = start < len(opened.window)
        into[inside] = opened.window[start[inside]]
        # Behind the last rows there is less than a window.
        for row in np.flatnonzero(~inside).tolist():
            tail = opened.rows[start[row] : start[row] + into.shape[1]]
            into[row, : len(tail)] = tail
    content *= np.arange(width) < length[:, None]
    return content


def _decode(
    arena: _Arena, shard: Ints, content: NDArray[np.uint8], length: Ints, form: RowFormat
) -> tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.float32], Ints]:
    """Classes in their order `[width, rows]`, levels counted from above, log_tail and count."""
    coder, total, highest = Decoder(arena.tables, content, length), len(length), scale_of(form) + 2
    contexts, order = shard * CONTEXTS, np.arange(total)
    count = np.full(total, form.width, np.int64)
    if form.ragged:
        count = coder.number(arena.base[contexts + COUNT])[0] + 1
        if int(count.max()) > form.width:
            raise ValueError(f"a row has {int(count.max())} entries, of at most {form.width}")
        order = np.argsort(-count, kind="stable")
        count, contexts = count[order], contexts[order]
        coder.reorder(order)
    least = coder.number(arena.base[contexts + LEAST])[0]
    row_class = row_class_of(least)
    level_base, gap_context = arena.base[contexts + LEVEL + row_class], contexts + GAP
    level_first = level_base >> PRECISION - STRIDE_BITS
    class_id = np.full(total, -1, np.int64)
    size, before = np.ones(total, np.int64), np.ones(total, np.int64)
    ids, levels = np.zeros((2, form.width, total), np.uint32)
    rows = total
    for place in range(int(count[0])):
        if form.ragged:
            rows = int(np.searchsorted(-count, -place))
        context = 3 * size[:rows]
        context += before[:rows]
        context += gap_context[:rows]
        before = size
        gap, size = coder.number(arena.base.take(context, mode="clip"))
        size >>= PRECISION
        level, _ = coder.number(level_base[:rows], level_first[:rows])
        gap += 1
        class_id[:rows] += gap
        ids[place, :rows] = class_id[:rows]
        levels[place, :rows] = level
    if int(class_id.max()) >= form.num_classes:
        raise ValueError(f"a row has class {int(class_id.max())}, of {form.num_classes}")
    high = coder.number(arena.base[contexts + TAIL + row_class])[0]
    tail = (high << TAIL_RAW) + coder.raw(TAIL_RAW)
    log_tail = np.where(high > 0, (tail - (1 << TAIL_RAW)) / np.float32(-TAIL_STEPS), -np.inf).astype(np.float32)
    falling = np.subtract(highest - least, levels, dtype=np.int32, casting="unsafe")
    np.maximum(falling, 1, out=falling)
    falling *= levels != TOP
    if not form.ragged:
        return ids, falling, log_tail, count
    falling[np.arange(form.width)[:, None] >= count] = PADDING
    back = np.argsort(order)
    return ids[:, back], falling[:, back], log_tail[back], count[back]


def _sorted(
    ids: NDArray[np.uint32], falling: NDArray[np.int32], log_tail: NDArray[np.float32], values: Any, first: Ints
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Class ids and log-probabilities `[rows, width]`: what the others leave, high to low levels; equal ones by class.

    Args:
        values: log-probabilities of the levels of all shards, and `first`, where those of each row's shard begin.
    """
    keys = (falling.astype(np.uint32) << ID_BITS) | ids
    ranked: NDArray[np.uint32] = np.ascontiguousarray(keys.T)
    ranked.sort(axis=1)
    place = (ranked >> ID_BITS).astype(np.int64)
    log_prob = values.take(place + first[:, None], mode="clip")
    if (place[:, -1] == PADDING).any():
        log_prob[place == PADDING] = -np.inf
    top = place[:, 0] == 0
    log_prob[top, 0] = _left(log_prob, log_tail)[top]
    return np.bitwise_and(ranked, (1 << ID_BITS) - 1), log_prob


def _left(log_prob: NDArray[np.float32], log_tail: NDArray[np.float32]) -> NDArray[np.float32]:
    """The log-probability that the others and the tail leave to the first; no less than that of the second."""
    prob = np.exp(log_prob)
    prob[:, 0] = np.exp(log_tail)
    left: NDArray[np.float32] = np.log(np.maximum(1 - prob.sum(axis=1), np.float32(1e-30)))
    return left if log_prob.shape[1] == 1 else np.maximum(left, log_prob[:, 1])


def check(opened: Opened, form: RowFormat) -> None:
    """Nothing: `take` looks at each row that it decodes."""
