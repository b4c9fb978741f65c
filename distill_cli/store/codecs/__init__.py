"""The codecs by name. Each is a module of the same four functions; readers never care which."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from distill_cli.store.codecs import compact, exact
from distill_cli.store.rows import RowFormat, Rows, Taken


class Codec(Protocol):
    def encode(self, rows: Rows, form: RowFormat) -> dict[str, NDArray[Any]]:
        """The arrays of a shard; equal rows give equal arrays."""
        ...

    def open(self, datasets: Mapping[str, NDArray[Any]], n: int, form: RowFormat) -> Any:
        """One shard of n rows, ready for `take`.

        Raises:
            ValueError: the arrays do not fit each other, or the form.
        """
        ...

    def check(self, opened: Any, form: RowFormat) -> None:
        """Look at every value once.

        Raises:
            ValueError: a value is none that a row can have.
        """
        ...

    def take(self, parts: Sequence[tuple[Any, NDArray[np.int64]]], form: RowFormat) -> Taken:
        """Rows `at` of several opened shards, one behind the other: most probable class first."""
        ...


CODECS: dict[str, Codec] = {"exact": cast(Codec, exact), "compact": cast(Codec, compact)}
