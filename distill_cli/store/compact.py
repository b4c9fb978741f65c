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

**Coder.** `distill_cli.store.rans`, one a row, frequencies of the shard. docs/store-format.md has every number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from distill_cli.store.rans import PRECISION, SYMBOLS, TOTAL, Decoder, Encoder, Ints, decoding_table, frequencies
from distill_cli.store.rans import symbols as symbols_of
from distill_cli.store.rows import RowFormat, Rows

NAMES = ("map", "symbols", "freq", "centre", "length", "rows")
POWER = 0.4
CENTRES = 16
CLASSES = 32
"""Of rows, by their smallest level."""
COUNT, LEAST, GAP, LEVEL, TAIL, CONTEXTS = 0, 1, 2, 11, 43, 75
"""The first context of each kind of number; from COUNT to TAIL each kind ends where the next begins."""
TOP = 0
"""In the place of an excess: what the others leave. An excess is coded as one more than it is."""
TAIL_STEPS = 512
"""Of log_tail, a nat."""
TAIL_RAW = 8
ENOUGH = 1024
"""Numbers that a context needs for a table of its own."""
SLACK = 1.5
"""Levels by which the most probable class may be off."""
PADDING = (1 << 14) - 1
"""Behind all levels; found as -inf."""
MAX_CLASSES = 1 << 18
ID_BITS = 18
ARENA = 256
"""Shards whose tables are kept side by side."""


@dataclass(frozen=True, eq=False)
class Opened:
    """One shard."""

    start: Ints
    """`[n + 1]`: where each row begins; the last is where they end."""
    rows: NDArray[np.uint8]
    base: Ints
    """`[contexts]`: where in `table` the table of each begins."""
    table: NDArray[np.uint32]
    log_prob: NDArray[np.float32]
    """`[levels]`, from the highest level to 0, behind a place for what is not there."""


def encode(rows: Rows, form: RowFormat) -> dict[str, NDArray[Any]]:
    """The datasets of one shard; equal rows give equal bytes.

    Raises:
        ValueError: a row has a class twice, or one that the format does not allow.
    """
    _check_form(form)
    numbers = _Numbers.of(rows, form)
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
    log_prob = np.concatenate([np.zeros(1, np.float32), _log_prob(form, centre)[::-1]])
    return Opened(start, content, table.astype(np.int64) << PRECISION, decoding_table(dense, _sizes(form)), log_prob)


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
        arena = _arena([opened for opened, _ in parts])
        shard = np.repeat([arena.place[opened] for opened, _ in parts], [len(at) for _, at in parts])
        length = np.concatenate([opened.start[at + 1] - opened.start[at] for opened, at in parts])
        content = _gather(parts, length)
        block = _block(form)
        for begin in range(0, total, block):
            rows = slice(begin, begin + block)
            decoded = _decode(arena, shard[rows], content[rows], length[rows], form)
            class_id[rows], log_prob[rows], log_tail[rows], count[rows] = decoded
    return class_id, log_prob, log_tail, count if form.ragged else None


# What a row says, as numbers


@dataclass(frozen=True)
class _Numbers:
    """The numbers of the rows of a shard, and their contexts."""

    count: Ints
    """`[n]`."""
    least: Ints
    """`[n]`: the smallest level."""
    gap: NDArray[np.int32]
    """`[k, n]`."""
    level: NDArray[np.int32]
    """`[k, n]`: one more than the excess, or TOP."""
    tail: Ints
    """`[n]`: 0 where nothing remains, else one more than -log_tail in steps."""
    gap_context: NDArray[np.uint8]
    """`[k, n]`."""
    centre: Ints
    """`[CENTRES]`."""
    ragged: bool

    @classmethod
    def of(cls, rows: Rows, form: RowFormat) -> "_Numbers":
        n, width = rows.class_id.shape
        count = np.full(n, width, np.int64) if rows.count is None else np.asarray(rows.count, np.int64)
        valid = np.arange(width)[:, None] < count
        class_id = np.where(valid, rows.class_id.T, MAX_CLASSES + np.arange(width)[:, None]).astype(np.int32)
        order = np.argsort(class_id, axis=0, kind="stable")
        ordered = np.take_along_axis(class_id, order, axis=0)
        gap = np.diff(ordered, axis=0, prepend=np.int32(-1)) - np.int32(1)
        if (gap < 0).any() or (ordered[valid] >= form.num_classes).any():
            raise ValueError(f"a row has a class twice, or one beyond the {form.num_classes}")
        prob = np.exp(np.minimum(np.take_along_axis(rows.log_prob.T, order, axis=0), 0).astype(np.float64))
        exact = _scale(form) * prob**POWER
        level = np.where(prob > 0, np.maximum(np.rint(exact), 1), 0).astype(np.int32)
        centre = _centres(exact[valid], level[valid])
        least = np.where(valid, level, MAX_CLASSES).min(axis=0, initial=MAX_CLASSES).astype(np.int64)
        with np.errstate(divide="ignore", over="ignore"):
            steps = np.rint(np.minimum(-TAIL_STEPS * rows.log_tail.astype(np.float64), (64 << TAIL_RAW) - 1))
        tail = np.where(np.isneginf(rows.log_tail), 0, np.maximum(steps, 0).astype(np.int64) + (1 << TAIL_RAW))
        near = (order == 0) & _near(level, exact, order == 0, tail, valid, _log_prob(form, centre), _scale(form))
        number = np.where(near, TOP, level - least.astype(np.int32) + 1)
        return cls(count, least, gap, number, tail, _gap_contexts(symbols_of(gap), form), centre, form.ragged)

    def counts(self) -> Ints:
        """How often each symbol occurs in each context: `[contexts, symbols]`."""
        out = np.zeros((CONTEXTS, SYMBOLS), np.int64)
        every = np.zeros(len(self.count), np.int64)
        if self.ragged:
            self._add(out, every + COUNT, self.count - 1)
        self._add(out, every + LEAST, self.least)
        row_class = _row_class(self.least)
        self._add(out, TAIL + row_class, self.tail >> TAIL_RAW)
        for place, (gap, level) in enumerate(zip(self.gap, self.level, strict=True)):
            live = self.count > place
            self._add(out, self.gap_context[place][live], gap[live])
            self._add(out, LEVEL + row_class[live], level[live])
        return out

    @staticmethod
    def _add(out: Ints, context: NDArray[Any], numbers: NDArray[Any]) -> None:
        found = np.bincount(context.astype(np.int64) * SYMBOLS + symbols_of(numbers), minlength=out.size)
        out += found.reshape(out.shape)


def _near(
    level: NDArray[Any],
    exact: NDArray[Any],
    top: NDArray[Any],
    tail: Ints,
    valid: NDArray[Any],
    log_prob: Any,
    scale: int,
) -> NDArray[np.bool_]:
    """Whether what the others leave to the most probable class is within SLACK levels of it: `[n]`."""
    others = np.where(valid & ~top, np.exp(log_prob[level], dtype=np.float64), 0).sum(axis=0)
    left = np.maximum(1 - others - np.where(tail > 0, np.exp((TAIL_STEPS // 2 - tail) / TAIL_STEPS), 0), 0)
    wanted = np.where(top, exact, 0).sum(axis=0)
    near: NDArray[np.bool_] = np.abs(scale * left**POWER - wanted) <= SLACK
    return near


def _gap_contexts(symbol: Ints, form: RowFormat) -> NDArray[np.uint8]:
    """GAP + 3 * the size of the gap before + that of the one before it, at the start 1 both: `[k, n]`."""
    size = np.ones((len(symbol) + 2, symbol.shape[1]), np.uint8)
    size[2:] = _sizes(form)[symbol]
    return np.asarray(GAP + 3 * size[1:-1] + size[:-2], np.uint8)


def _sizes(form: RowFormat) -> Ints:
    """Whether a symbol means a small, a middling or a large gap: 0 up to a quarter of the mean, 1 up to it, then 2."""
    small, mean = symbols_of(np.array([form.num_classes // (4 * form.width), form.num_classes // form.width]))
    symbol = np.arange(SYMBOLS)
    return np.asarray(0 + (symbol > small) + (symbol > mean), np.int64)


def _row_class(least: Ints) -> Ints:
    return np.minimum(symbols_of(least), CLASSES - 1)


def _scale(form: RowFormat) -> int:
    """q: the level of p = 1."""
    return 9 << form.bits - 3


def _centres(exact: NDArray[Any], level: NDArray[Any]) -> Ints:
    """Where in the cell of each of the levels 1 to CENTRES the mean probability lies, in 2^-16 of the cell."""
    low = level <= CENTRES
    number = np.bincount(level[low], minlength=CENTRES + 1)[1:]
    mean = np.bincount(level[low], exact[low] ** (1 / POWER), minlength=CENTRES + 1)[1:] / np.maximum(number, 1)
    begin, end = _cells()
    place = np.where(number > 0, (mean**POWER - begin) / (end - begin), 0.5)
    return np.asarray(np.clip(place * 65536, 0, 65535), np.int64)


def _cells() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ends of the cells of the levels 1 to CENTRES: 0 to 1.5, 1.5 to 2.5, …"""
    level = np.arange(1, CENTRES + 1, dtype=np.float64)
    return np.where(level > 1, level - 0.5, 0), level + 0.5


def _log_prob(form: RowFormat, centre: NDArray[Any]) -> NDArray[np.float32]:
    """The log-probability of each level."""
    exact = np.arange(_scale(form) + 1, dtype=np.float64)
    begin, end = _cells()
    exact[1 : CENTRES + 1] = begin + (end - begin) * (centre + 0.5) / 65536
    with np.errstate(divide="ignore"):
        return (np.log(exact / _scale(form)) / POWER).astype(np.float32)


def _block(form: RowFormat) -> int:
    """Rows that are coded at a time: what a few vectors of them take fits a cache, and what they decode to a memory."""
    return max(16, min(4096, (1 << 21) // form.width))


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


def _code(numbers: _Numbers, table: Ints, freq: Ints, form: RowFormat) -> tuple[Ints, NDArray[np.uint8]]:
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
        row_class = _row_class(least)
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
    base: Ints
    """`[shards * contexts]`."""
    table: NDArray[np.uint32]
    log_prob: NDArray[np.float32]
    """`[shards * levels]`."""


_last: _Arena | None = None


def _arena(wanted: list[Opened]) -> _Arena:
    """That of the last batch if it has these shards: shuffled batches ask for the same ones again and again."""
    global _last
    arena = _last
    if arena is not None and all(opened in arena.place for opened in wanted):
        return arena
    kept = list(dict.fromkeys([*wanted, *(arena.place.keys() if arena else ())]))
    kept = [each for each in kept if len(each.log_prob) == len(wanted[0].log_prob)][: max(ARENA, len(wanted))]
    begin = np.cumsum([0, *(len(each.table) for each in kept)])
    arena = _Arena(
        WeakKeyDictionary({each: number for number, each in enumerate(kept)}),
        np.concatenate([each.base + first for each, first in zip(kept, begin[:-1], strict=True)]),
        np.concatenate([each.table for each in kept]),
        np.concatenate([each.log_prob for each in kept]),
    )
    _last = arena
    return arena


def _gather(parts: Sequence[tuple[Opened, NDArray[np.int64]]], length: Ints) -> NDArray[np.uint8]:
    """The bytes of each row, then zeros: `[rows, width]`."""
    width = (int(length.max()) + 11) // 4 * 4
    content = np.zeros((len(length), width), np.uint8)
    end = 0
    for opened, at in parts:
        into = content[end : end + len(at)]
        end += len(at)
        start = opened.start[at]
        inside = start + width <= len(opened.rows)
        if inside.any():
            into[inside] = sliding_window_view(opened.rows, width)[start[inside]]
        for row in np.flatnonzero(~inside):
            tail = opened.rows[start[row] : start[row] + width]
            into[row, : len(tail)] = tail
    content *= np.arange(width) < length[:, None]
    return content


def _decode(
    arena: _Arena, shard: Ints, content: NDArray[np.uint8], length: Ints, form: RowFormat
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32], Ints]:
    coder, total, scale = Decoder(arena.table, content, length), len(length), _scale(form)
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
    row_class = _row_class(least)
    level_base, gap_context = arena.base[contexts + LEVEL + row_class], contexts + GAP
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
        level, _ = coder.number(level_base[:rows])
        gap += 1
        class_id[:rows] += gap
        ids[place, :rows] = class_id[:rows]
        levels[place, :rows] = level
    if int(class_id.max()) >= form.num_classes:
        raise ValueError(f"a row has class {int(class_id.max())}, of {form.num_classes}")
    high = coder.number(arena.base[contexts + TAIL + row_class])[0]
    tail = (high << TAIL_RAW) + coder.raw(TAIL_RAW)
    back = np.argsort(order)
    log_tail = np.where(high > 0, (tail - (1 << TAIL_RAW)) / np.float32(-TAIL_STEPS), -np.inf).astype(np.float32)[back]
    # Sorted as one: high levels first, TOP before all, then by class.
    keys = np.subtract(scale + 2 - least, levels, dtype=np.int32, casting="unsafe")
    np.maximum(keys, 1, out=keys)
    keys *= levels != TOP
    if form.ragged:
        keys[np.arange(form.width)[:, None] >= count] = PADDING
    keys <<= ID_BITS
    keys |= ids.view(np.int32)
    ranked = np.ascontiguousarray(keys.T).view(np.uint32)[back]
    ranked.sort(axis=1)
    class_id, falling = ranked & ((1 << ID_BITS) - 1), (ranked >> ID_BITS).astype(np.int64)
    top = np.flatnonzero(falling[:, 0] == 0)
    if form.ragged:
        np.minimum(falling, scale + 1, out=falling)
    falling += (shard * (scale + 2))[:, None]
    log_prob = arena.log_prob.take(falling, mode="clip")
    log_prob[top, 0] = _left(log_prob, log_tail)[top]
    return class_id, log_prob, log_tail, count[back]


def _left(log_prob: NDArray[np.float32], log_tail: NDArray[np.float32]) -> NDArray[np.float32]:
    """The log-probability that the others and the tail leave to the first; no less than that of the second."""
    prob = np.exp(log_prob)
    prob[:, 0] = np.exp(log_tail)
    left: NDArray[np.float32] = np.log(np.maximum(1 - prob.sum(axis=1), np.float32(1e-30)))
    return left if log_prob.shape[1] == 1 else np.maximum(left, log_prob[:, 1])
