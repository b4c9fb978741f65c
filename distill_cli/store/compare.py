"""Rows of a store against what the teacher says now of the same inputs: equal up to a tolerance, ties and the codec.

Let s be a stored row, f the teacher's log-probabilities of all classes now, and e what the codec itself moves this
row: the largest |decode(encode(f_c)) - f_c|. A row passes, with t the tolerance in nats and only probabilities of at
least `FLOOR` looked at, if

    values     |s_c - f_c| <= t + e                             for every class c that is kept
    classes    f_c <= min s + t + e                             for every class c that is not: ties may fall either way
    tail       |log tail_s - log tail_f| <= t + e + e_tail      where the same classes are kept
    count      mass of the first n >= P - d,  of the first n - 1 < P + d,  d = (1 - P)(e^t - 1) + FLOOR
                                                                of rows cut at mass P, unless n is an end of its range
    draws      |log sum drawn_s - log sum drawn_f| <= t + e + e_drawn

An original and a fresh value that differ by less than t are coded alike, or as neighbours; both are within the codec's
own step of each other, so that this holds for a codec whatever its step. Which classes were drawn is compared over
all rows, by the share of the drawn mass that is the same: a draw moves to its neighbour where a sum's last bit differs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.store.codecs import CODECS
from distill_cli.store.plan import Plan
from distill_cli.store.rows import Rows

FLOOR = 1e-4
"""Smaller probabilities are not compared."""
LOG_FLOOR = np.log(FLOOR)
CAUSES = ("values", "classes", "tail", "count", "draws")

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Compared:
    """What was found of n rows."""

    beyond: dict[str, Bool]
    """By cause, `[n]`: whether a row is beyond the tolerance."""
    largest: Float
    """`[n]`: max |s_c - f_c|."""
    total: float
    """Sum of |s_c - f_c| over all rows …"""
    entries: int
    """… and over so many classes."""
    codec: Float
    """`[n]`: e."""
    identical: Bool
    """`[n]`: every bit."""
    other_classes: Bool
    """`[n]`: whether other classes are kept, for whatever reason."""
    same_draws: float
    """Drawn mass that is the same …"""
    draws: float
    """… of so much."""


def compare(plan: Plan, stored: Rows, fresh: Rows, log_prob: NDArray[np.float32], tolerance: float) -> Compared:
    """Compare rows of the same samples.

    Args:
        stored: as the store gives them.
        fresh: as the teacher gives them now, not yet through the codec.
        log_prob: `[n, classes]`, of the teacher now.
        tolerance: t, in nats.
    """
    values, again = log_prob.astype(np.float64), _through_codec(plan, fresh)
    kept, kept_fresh = _exact(plan, stored), _exact(plan, fresh)
    difference, looked = _differences(stored, values, kept)
    codec = _most(_differences(again, values, _exact(plan, again))[0])
    limit = tolerance + codec
    largest = _most(difference)
    other_classes = (_set(plan, stored, kept) != _set(plan, fresh, kept_fresh)).any(axis=1)
    last = np.where(kept, stored.log_prob.astype(np.float64), np.inf).min(axis=1, initial=np.inf)
    others = values.copy()
    np.put_along_axis(others, np.where(kept, stored.class_id.astype(np.int64), _first(stored)), -np.inf, axis=1)
    best_other = others.max(axis=1) if plan.top_k else np.full(len(values), -np.inf)
    drawn, drawn_again = _drawn(plan, stored), _drawn(plan, again)
    return Compared(
        beyond={
            "values": largest > limit,
            "classes": best_other > np.maximum(last, LOG_FLOOR) + limit,
            "tail": ~other_classes & _apart(stored.log_tail, fresh.log_tail, again.log_tail, limit),
            "count": _miscounted(plan, stored, values, tolerance),
            "draws": _apart(_log_mass(drawn), _log_mass(_drawn(plan, fresh)), _log_mass(drawn_again), limit),
        },
        largest=largest,
        total=float(difference.sum()),
        entries=int(looked.sum()),
        codec=codec,
        identical=_identical(stored, again),
        other_classes=other_classes,
        same_draws=float(np.minimum(drawn, drawn_again).sum()),
        draws=float(np.maximum(drawn, drawn_again).sum()),
    )


def _through_codec(plan: Plan, rows: Rows) -> Rows:
    codec, n = CODECS[plan.codec], len(rows)
    opened = codec.open(codec.encode(rows, plan.form), n, plan.form)
    return Rows(rows.sample_id, *codec.take([(opened, np.arange(n))], plan.form))


def _entries(rows: Rows) -> Bool:
    """What is not padding: `[n, k]`."""
    k = rows.class_id.shape[1]
    ends = np.full(len(rows), k) if rows.count is None else rows.count
    return np.arange(k) < ends[:, None]


def _exact(plan: Plan, rows: Rows) -> Bool:
    """The entries that are the teacher's own values, and not draws: `[n, k]`."""
    return _entries(rows) & (np.arange(rows.class_id.shape[1]) < plan.top_k)


def _differences(rows: Rows, values: Float, kept: Bool) -> tuple[Float, Bool]:
    """|row - value| of the entries that are looked at, 0 of the others; and which those are."""
    said = rows.log_prob.astype(np.float64)
    now = np.take_along_axis(values, rows.class_id.astype(np.int64), axis=1)
    looked = kept & (np.maximum(said, now) >= LOG_FLOOR)
    with np.errstate(invalid="ignore"):
        return np.where(looked, np.abs(said - now), 0), looked


def _most(values: Float) -> Float:
    return np.asarray(values.max(axis=1, initial=0), np.float64)


def _set(plan: Plan, rows: Rows, kept: Bool) -> NDArray[np.int64]:
    """The classes of each row, ascending, behind as many -1 as are not kept: `[n, top_k]`."""
    return np.sort(np.where(kept, rows.class_id.astype(np.int64), -1)[:, : plan.top_k], axis=1)


def _first(rows: Rows) -> NDArray[np.int64]:
    """A class that is kept anyway, to stand in for padding: `[n, 1]`."""
    return rows.class_id[:, :1].astype(np.int64)


def _log_mass(drawn: Float) -> Float:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(drawn.sum(axis=1)), np.float64)


def _apart(stored: NDArray[Any], fresh: NDArray[Any], again: NDArray[Any], limit: Float) -> Bool:
    """Whether logs of masses differ by more than the limit and what the codec moves."""
    looked = np.maximum(stored, fresh) >= LOG_FLOOR
    with np.errstate(invalid="ignore"):
        beyond = ~(np.abs(stored - fresh) <= limit + np.abs(again - fresh))
    return np.asarray(looked & beyond, np.bool_)


def _miscounted(plan: Plan, rows: Rows, values: Float, tolerance: float) -> Bool:
    """Whether rows that were cut at a mass have more or fewer classes than that takes."""
    if plan.keep_mass is None or rows.count is None:
        return np.zeros(len(rows), np.bool_)
    held = np.pad(np.exp(-np.sort(-values, axis=1)).cumsum(axis=1), ((0, 0), (1, 0)))
    slack = (1 - plan.keep_mass) * np.expm1(tolerance) + FLOOR
    enough, before = (np.take_along_axis(held, at[:, None], axis=1)[:, 0] for at in (rows.count, rows.count - 1))
    short = (enough < plan.keep_mass - slack) & (rows.count < plan.top_k)
    long = (before >= plan.keep_mass + slack) & (rows.count > plan.min_k)
    return np.asarray(short | long | (rows.count < plan.min_k), np.bool_)


def _drawn(plan: Plan, rows: Rows) -> Float:
    """The mass that each class was drawn with: `[n, classes]`; of rows without draws `[n, 0]`."""
    if not plan.sample:
        return np.zeros((len(rows), 0))
    out = np.zeros((len(rows), plan.num_classes))
    row, at = np.nonzero(_entries(rows) & ~_exact(plan, rows))
    out[row, rows.class_id[row, at].astype(np.int64)] = np.exp(rows.log_prob[row, at].astype(np.float64))
    return out


def _identical(stored: Rows, again: Rows) -> Bool:
    same = (stored.class_id == again.class_id).all(axis=1) & (stored.log_prob == again.log_prob).all(axis=1)
    same &= stored.log_tail == again.log_tail
    if stored.count is not None and again.count is not None:
        same &= stored.count == again.count
    return np.asarray(same, np.bool_)
