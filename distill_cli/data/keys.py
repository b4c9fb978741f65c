"""The names of samples, a million of them in one buffer rather than in a million objects."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from distill_cli.files import sha256


@dataclass(frozen=True, eq=False)
class Keys(Sequence[str]):
    """Names behind each other in one buffer, a newline between two; pickles as two arrays.

    A file name is any bytes but `/` and NUL: newlines are kept, since `ends` says where a name ends, and bytes that are
    not UTF-8 are surrogates in the str, as `os.fsdecode` has them.
    """

    joined: bytes
    ends: NDArray[np.int64]
    """Where each name ends in `joined`; the next begins one further."""

    @classmethod
    def of(cls, names: Iterable[str]) -> "Keys":
        encoded = [name.encode(errors="surrogateescape") for name in names]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(b"\n".join(encoded), np.cumsum(lengths + 1) - 1)

    @classmethod
    def chain(cls, parts: Sequence["Keys"]) -> "Keys":
        """The names of several, one after the other."""
        parts = [part for part in parts if len(part)]
        starts = np.cumsum([0] + [len(part.joined) + 1 for part in parts])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(b"\n".join(part.joined for part in parts), np.concatenate([np.zeros(0, np.int64), *ends]))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"{place} of {len(self)} names")
        place %= len(self)
        start = int(self.ends[place - 1]) + 1 if place else 0
        return self.joined[start : int(self.ends[place])].decode(errors="surrogateescape")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Keys):
            return self.joined == other.joined and np.array_equal(self.ends, other.ends)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Numbers(Sequence[str]):
    """The names of samples that have none: `0`, `1`, … in decimal."""

    total: int

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        places = range(self.total)[index]
        return str(places) if isinstance(places, int) else list(map(str, places))


def keys_sha256(keys: Sequence[str]) -> str:
    """The sha256 of the names joined by a newline, as UTF-8, bytes that are not as they are."""
    joined = keys.joined if isinstance(keys, Keys) else "\n".join(keys).encode(errors="surrogateescape")
    return sha256(joined)


def first_double(names: Sequence[str]) -> str | None:
    """A name that is there twice, or None."""
    if len(set(names)) == len(names):
        return None
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
