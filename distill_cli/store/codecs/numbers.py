"""What the rows of a shard say, as the whole numbers that the codec `compact` writes, and the values of levels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.store.codecs.rans import SYMBOLS, Ints, symbols
from distill_cli.store.rows import RowFormat, Rows

POWER = 0.4
CENTRES = 16
CLASSES = 32
"""Of rows, by their smallest level."""
COUNT, LEAST, GAP, LEVEL, TAIL, CONTEXTS = 0, 1, 2, 11, 43, 75
"""The first context of each kind of number; from COUNT to TAIL each kind ends where the next begins."""
TOP = 0
"""In the place of an excess: what the others leave. An excess is coded as one more than it is."""
TAIL_STEPS = 128
"""Of log_tail, a nat."""
TAIL_RAW = 6
SLACK = 1.5
"""Levels by which the most probable class may be off."""
MAX_CLASSES = 1 << 18


@dataclass(frozen=True)
class Numbers:
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
    """`[n]`: 0 where nothing remains, else -log_tail in steps, plus 2^TAIL_RAW."""
    gap_context: NDArray[np.uint8]
    """`[k, n]`."""
    centre: Ints
    """`[CENTRES]`."""
    ragged: bool

    @classmethod
    def of(cls, rows: Rows, form: RowFormat) -> "Numbers":
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
        exact = scale_of(form) * prob**POWER
        level = np.where(prob > 0, np.maximum(np.rint(exact), 1), 0).astype(np.int32)
        centre = _centres(exact[valid], level[valid])
        least = np.where(valid, level, MAX_CLASSES).min(axis=0, initial=MAX_CLASSES).astype(np.int64)
        with np.errstate(divide="ignore", over="ignore"):
            steps = np.rint(np.minimum(-TAIL_STEPS * rows.log_tail.astype(np.float64), (64 << TAIL_RAW) - 1))
        tail = np.where(np.isneginf(rows.log_tail), 0, np.maximum(steps, 0).astype(np.int64) + (1 << TAIL_RAW))
        near = (order == 0) & _near(level, exact, order == 0, tail, valid, level_log_prob(form, centre), scale_of(form))
        number = np.where(near, TOP, level - least.astype(np.int32) + 1)
        return cls(count, least, gap, number, tail, _gap_contexts(symbols(gap), form), centre, form.ragged)

    def counts(self) -> Ints:
        """How often each symbol occurs in each context: `[contexts, symbols]`."""
        out = np.zeros((CONTEXTS, SYMBOLS), np.int64)
        every = np.zeros(len(self.count), np.int64)
        if self.ragged:
            self._add(out, every + COUNT, self.count - 1)
        self._add(out, every + LEAST, self.least)
        row_class = row_class_of(self.least)
        self._add(out, TAIL + row_class, self.tail >> TAIL_RAW)
        for place, (gap, level) in enumerate(zip(self.gap, self.level, strict=True)):
            live = self.count > place
            self._add(out, self.gap_context[place][live], gap[live])
            self._add(out, LEVEL + row_class[live], level[live])
        return out

    @staticmethod
    def _add(out: Ints, context: NDArray[Any], numbers: NDArray[Any]) -> None:
        found = np.bincount(context.astype(np.int64) * SYMBOLS + symbols(numbers), minlength=out.size)
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
    size[2:] = gap_sizes(form)[symbol]
    return np.asarray(GAP + 3 * size[1:-1] + size[:-2], np.uint8)


def gap_sizes(form: RowFormat) -> Ints:
    """Whether a symbol means a small, a middling or a large gap: 0 up to a quarter of the mean, 1 up to it, then 2."""
    small, mean = symbols(np.array([form.num_classes // (4 * form.width), form.num_classes // form.width]))
    symbol = np.arange(SYMBOLS)
    return np.asarray(0 + (symbol > small) + (symbol > mean), np.int64)


def row_class_of(least: Ints) -> Ints:
    return np.minimum(symbols(least), CLASSES - 1)


def scale_of(form: RowFormat) -> int:
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


def level_log_prob(form: RowFormat, centre: NDArray[Any]) -> NDArray[np.float32]:
    """The log-probability of each level."""
    exact = np.arange(scale_of(form) + 1, dtype=np.float64)
    begin, end = _cells()
    exact[1 : CENTRES + 1] = begin + (end - begin) * (centre + 0.5) / 65536
    with np.errstate(divide="ignore"):
        return (np.log(exact / scale_of(form)) / POWER).astype(np.float32)
