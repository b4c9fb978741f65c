"""Rows of several teachers as one, and rows over other classes: exact where tails are uniform, and never dense.

A row is a distribution over C classes: p(c) of its k entries, and m = tail / (C - k) of each class besides. What is
made of such rows here is one too: its entries are the union of theirs.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distill_cli.store.rows import Rows

Space = Literal["probability", "log"]
Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
LOW = 2**32 - 1
"""The lower half of a number that is sorted by its upper half; as a class, none."""


class EmptyRow(ValueError):
    """Nothing is left of a row."""


def average(parts: Sequence[Rows], weights: Sequence[float], num_classes: int, space: Space) -> Rows:
    """The weighted average of some teachers' rows of the same samples, as rows.

        probability    p(c) = sum_i w_i p_i(c)
        log            p(c) = prod_i p_i(c)^w_i / Z,    Z its sum over all classes

    Each teacher's row counts as if it summed to one exactly, as `sparse.soften` has it. Of sampled rows the first has
    the averaged teachers as its expectation; the second estimates nothing.

    Args:
        parts: a teacher each, over `num_classes` classes.
        weights: positive, of sum 1.

    Returns:
        Rows whose entries are those that any of the teachers has, most probable first, of equal ones the lower class;
        with `count` where their number differs. class_id int64, values float32.

    Raises:
        EmptyRow: `log`, and of some row no class has a probability of every teacher.
    """
    return _average_of_logs(parts, weights, num_classes) if space == "log" else _average(parts, weights, num_classes)


def _average(parts: Sequence[Rows], weights: Sequence[float], num_classes: int) -> Rows:
    # An entry says what it adds to the mass that each class has as one of all tails.
    ids, added, base = [], [], np.zeros(len(parts[0]))
    for rows, weight in zip(parts, weights, strict=True):
        log_prob, log_one = _normalised(rows, num_classes)
        one = np.exp(log_one)
        ids.append(_ids(rows, num_classes))
        added.append(weight * (np.exp(log_prob) - one[:, None]))
        base += weight * one
    union, (total,) = _united(np.concatenate(ids, axis=1), [np.concatenate(added, axis=1)], len(parts))
    prob = np.maximum(base[:, None] + total, np.finfo(np.float64).tiny)
    log_prob = np.where(union < num_classes, np.log(prob), -np.inf)
    return _sorted(parts[0].sample_id, union, log_prob, _log(base), num_classes)


def _average_of_logs(parts: Sequence[Rows], weights: Sequence[float], num_classes: int) -> Rows:
    # As above, in logs; a teacher without a tail adds nothing to the base, and is counted where it has an entry.
    ids, added, there = [], [], []
    base, without = np.zeros(len(parts[0])), np.zeros(len(parts[0]))
    for rows, weight in zip(parts, weights, strict=True):
        log_prob, log_one = _normalised(rows, num_classes)
        none = np.isneginf(log_one)
        one = np.where(none, 0, log_one)
        ids.append(_ids(rows, num_classes))
        added.append(weight * (log_prob - one[:, None]))
        there.append(np.repeat(none[:, None], log_prob.shape[1], axis=1).astype(np.float64))
        base += weight * one
        without += none
    columns = [np.concatenate(added, axis=1), np.concatenate(there, axis=1)]
    union, (total, known) = _united(np.concatenate(ids, axis=1), columns, len(parts))
    held = (union < num_classes) & (known == without[:, None])
    log_prob = np.where(held, base[:, None] + total, -np.inf)
    return _sorted(parts[0].sample_id, union, log_prob, np.where(without > 0, -np.inf, base), num_classes)


def gather(rows: Rows, classes: Ids, num_classes: int) -> Rows:
    """Rows over some of their classes, under other ids: p'(c) = p(classes[c]) / sum_c p(classes[c]).

    A row that has none of these classes among its entries is uniform over them: its entry is then class 0.

    Args:
        rows: over `num_classes` classes; not sampled, as a quotient of two estimates is biased.
        classes: of each new class the old one, none of them twice.

    Returns:
        As `average`.

    Raises:
        EmptyRow: some row has no mass on these classes.
    """
    new = np.full(num_classes + 1, len(classes))
    new[classes] = np.arange(len(classes))
    ids = new[_ids(rows, num_classes)]
    log_prob, log_one = _normalised(rows, num_classes)
    bare = (ids == len(classes)).all(axis=1)
    ids[bare, 0], log_prob[bare, 0] = 0, log_one[bare]
    log_prob[ids == len(classes)] = -np.inf
    return _sorted(rows.sample_id, ids, log_prob, log_one, len(classes))


def _normalised(rows: Rows, num_classes: int) -> tuple[Floats, Floats]:
    """log p of the entries `[n, k]`, -inf of padding, and log m `[n]`; each row of sum one."""
    log_prob = rows.log_prob.astype(np.float64)
    count = np.full(len(rows), log_prob.shape[1]) if rows.count is None else rows.count
    log_tail = np.where(count == num_classes, -np.inf, rows.log_tail)
    norm = _log_sum(log_prob, log_tail)
    return log_prob - norm[:, None], log_tail - norm - np.log(np.maximum(num_classes - count, 1))


def _ids(rows: Rows, num_classes: int) -> Ids:
    """The classes of the entries `[n, k]`, `num_classes` in place of padding."""
    ids = rows.class_id.astype(np.int64)
    if rows.count is not None:
        ids[np.arange(ids.shape[1]) >= rows.count[:, None]] = num_classes
    return ids


def _united(ids: Ids, values: Sequence[Floats], most: int) -> tuple[Ids, list[Floats]]:
    """Entries sorted by class; of equal ones the first has the sum of their values, the others are padding.

    Args:
        most: how often a class can be in a row.
    """
    # Numbers are sorted several times as fast as places are.
    keys = np.sort(ids << 32 | np.arange(ids.shape[1]), axis=1)
    ids, places = keys >> 32, keys & LOW
    values = [value[np.arange(len(ids))[:, None], places] for value in values]
    sums = [value.copy() for value in values]
    for step in range(1, most):
        row, place = np.nonzero(ids[:, step:] == ids[:, :-step])
        for total, value in zip(sums, values, strict=True):
            total[row, place] += value[row, place + step]
    again = ids[:, 1:] == ids[:, :-1]
    ids[:, 1:][again] = LOW
    return ids, sums


def _sorted(sample_id: NDArray[Any], ids: Ids, log_prob: Floats, log_one: Floats, num_classes: int) -> Rows:
    """Rows of sum one.

    Args:
        log_prob: of the entries, -inf of what is none.
        log_one: of each class that is no entry.

    Raises:
        EmptyRow: some row has no mass.
    """
    count = np.isfinite(log_prob).sum(axis=1)
    log_tail = log_one + _log(num_classes - count)
    norm = _log_sum(log_prob, log_tail)
    if np.isneginf(norm).any():
        raise EmptyRow("a row has no mass on any class")
    # The bits of a positive float32 are in its order; below them the class travels along.
    cost = np.abs(np.minimum(log_prob - norm[:, None], 0)).astype(np.float32)
    keys = np.sort(cost.view(np.uint32).astype(np.int64) << 32 | ids, axis=1)[:, : count.max()]
    padding = np.arange(keys.shape[1]) >= count[:, None]
    class_id, cost = np.where(padding, 0, keys & LOW), (keys >> 32).astype(np.uint32).view(np.float32)
    ragged = count.min() < keys.shape[1]
    return Rows(sample_id, class_id, -cost, (log_tail - norm).astype(np.float32), count if ragged else None)


def _log_sum(log_prob: Floats, log_tail: Floats) -> Floats:
    """log of what a row holds in all `[n]`; -inf of nothing."""
    top = np.maximum(log_prob.max(axis=1), log_tail)
    top = np.where(np.isneginf(top), 0, top)
    total: Floats = top + _log(np.exp(log_prob - top[:, None]).sum(axis=1) + np.exp(log_tail - top))
    return total


def _log(values: NDArray[Any]) -> Floats:
    """-inf of zero."""
    with np.errstate(divide="ignore"):
        logs: Floats = np.log(values)
    return logs
