"""Labels as files have them, numbers or names, -> class ids and class names."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import UsageError

Labels = tuple[NDArray[np.int64], tuple[str, ...] | None]
"""Class ids, and the class names where there are any."""
MOST = 2**32
"""Class ids are below this: a store keeps them as uint32."""


def from_text(values: Sequence[str], where: str) -> Labels:
    """Labels written as text. If all are integers, they are the class ids; else names, sorted by code point.

    Raises:
        UsageError: an integer is out of range.
    """
    different = dict.fromkeys(values)
    if all(re.fullmatch(r"[+-]?\d+", value, re.ASCII) for value in different):
        number = {value: int(value) for value in different}
        for value in number.values():
            check_range(value, where)
        return np.fromiter((number[value] for value in values), np.int64, len(values)), None
    classes = tuple(sorted(different))
    number = {name: place for place, name in enumerate(classes)}
    return np.fromiter((number[value] for value in values), np.int64, len(values)), classes


def from_numbers(values: object, where: str) -> NDArray[np.int64]:
    """Labels that are numbers already.

    Raises:
        UsageError: they are not integers, or one is out of range.
    """
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"{where}: labels are {array.dtype} of shape {array.shape}; give an integer or name per image")
    if len(array):
        check_range(int(array.min()), where)
        check_range(int(array.max()), where)
    return array.astype(np.int64)


def check_range(value: int, where: str) -> None:
    if not 0 <= value < MOST:
        raise UsageError(f"{where}: label {value}; give class ids from 0 on, or --set data.labelled=false")
