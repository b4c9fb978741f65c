"""Rows of a store in memory: what codecs take and give."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowFormat:
    """What all rows of a store have in common; a codec needs to know no more."""

    num_classes: int
    width: int
    """The most entries that a row can have; where rows are not ragged, the entries of each."""
    ragged: bool = False
    """Whether each row has its own number of entries."""
    bits: int = 8
    """Of the codec `compact`."""


@dataclass(frozen=True)
class Rows:
    """Rows of one view. Where they are ragged, entry j >= count of a row is padding: class 0, log-probability -inf."""

    sample_id: NDArray[Any]
    """`[n]`."""
    class_id: NDArray[Any]
    """`[n, k]`, most probable first."""
    log_prob: NDArray[Any]
    """`[n, k]`."""
    log_tail: NDArray[Any]
    """`[n]`: log of the mass of all other classes; -inf where nothing remains."""
    count: NDArray[np.int64] | None = None
    """`[n]`: entries of each row; None where each has k."""

    def __len__(self) -> int:
        return len(self.sample_id)


def at(rows: Rows, which: NDArray[np.int64] | slice) -> Rows:
    """Some of the rows."""
    count = None if rows.count is None else rows.count[which]
    return Rows(rows.sample_id[which], rows.class_id[which], rows.log_prob[which], rows.log_tail[which], count)


def trim(rows: Rows, k: int) -> Rows:
    """Rows of the k most probable classes: the mass of the others goes to the tail."""
    gone = rows.log_prob[:, k:].astype(np.float64)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.exp(rows.log_tail.astype(np.float64)) + np.exp(gone).sum(axis=1))
    count = None if rows.count is None else np.minimum(rows.count, k)
    return Rows(rows.sample_id, rows.class_id[:, :k], rows.log_prob[:, :k], log_tail, count)


Taken = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[np.int64] | None]
"""class_id, log_prob, log_tail and count of rows, as a codec gives them."""
