"""How TinyViT's files name samples: by index, or by the stem of the image file."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from distill_cli.data import open_train
from distill_cli.data.config import DataConfig
from distill_cli.data.sources import Source, fingerprint
from distill_cli.errors import MismatchError, UsageError
from distill_cli.store.reader import Store
from distill_cli.store.tinyvit import Epoch, RankFile

NAMED = 3
"""Values that a message names."""
_NO_INDEX = re.compile(rb"^(?:0[0-9]|[0-9]{19}|\n)", re.MULTILINE)


def stems(source: Source) -> list[str]:
    """The name of each sample's file without folders and ending, as TinyViT's keys of ImageNet-22k are."""
    return [PurePosixPath(key).stem for key in source.keys]


def names_of(store: Store, keys: str, data: str | None) -> list[str]:
    """The stems of a store's samples, from the data that it was written from.

    Raises:
        UsageError: no data is named, or there is no such kind of key.
        MismatchError: it is other data.
    """
    if keys != "stem":
        raise UsageError(f"--keys {keys}: no such kind of key; there are index, stem")
    source = open_train(DataConfig(path=data))
    found, known = fingerprint(source)["keys_sha256"], store.plan.data["keys_sha256"]
    if found != known:
        raise MismatchError(
            f"store {store}: keys fingerprint {known[:12]}, that of the data {str(found)[:12]}; "
            "give the data that the store was written from"
        )
    return stems(source)


class Names:
    """Keys -> sample ids."""

    def __init__(self, source: Source, kind: str) -> None:
        """
        Args:
            kind: `index` or `stem`.

        Raises:
            UsageError: several samples have the same stem.
        """
        self.kind, self.samples = kind, len(source)
        if kind == "stem":
            named = np.array([stem.encode(errors="surrogateescape") for stem in stems(source)])
            self._order = np.argsort(named, kind="stable")
            self._sorted = named[self._order]
            twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
            if len(twice):
                first, second = (source.keys[int(i)] for i in self._order[twice[0] : twice[0] + 2])
                raise UsageError(f"--keys stem: {first} and {second} have the same stem; give data where none have")

    def ids(self, file: RankFile) -> NDArray[np.int64]:
        """The sample of each record of a file.

        Raises:
            MismatchError: the data has no such samples; the first of them are named.
        """
        content = file.keys()
        if self.kind == "index" and _are_indices(content):
            ids = np.fromstring(content, np.int64, sep="\n")
            known = ids < self.samples
        else:
            keys = np.array(content.split(b"\n")[:-1], np.bytes_)
            if self.kind == "index" or len(keys) == 0:
                ids, known = np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
            else:
                place = np.minimum(np.searchsorted(self._sorted, keys), self.samples - 1)
                ids, known = self._order[place], self._sorted[place] == keys
        if not known.all():
            unknown = np.array(content.split(b"\n")[:-1], object)[~known]
            raise MismatchError(
                f"{file.keys_path}: {len(unknown)} keys are no {'indices' if self.kind == 'index' else 'file stems'} "
                f"of the {self.samples} samples ({some([key.decode(errors='replace') for key in unknown])}); "
                "give the data that the logits were saved of, or --keys"
            )
        return ids


def _is_index(stem: str) -> bool:
    return stem.isdecimal() and stem == str(int(stem))


def _are_indices(keys: bytes) -> bool:
    """Whether each line is a number as Python writes it."""
    return not keys.translate(None, b"0123456789\n") and not _NO_INDEX.search(keys)


def open_names(source: Source, kind: str, epoch: Epoch) -> Names:
    """
    Raises:
        UsageError: the keys could be either, and mean other samples.
    """
    if kind not in ("auto", "index", "stem"):
        raise UsageError(f"--keys {kind}: no such kind of key; there are auto, index, stem")
    if kind != "auto":
        return Names(source, kind)
    first = epoch.ranks[0].keys_path
    if not first.is_file() or not _are_indices(epoch.ranks[0].keys()):
        return Names(source, "stem")
    other = next((i for i, stem in enumerate(stems(source)) if _is_index(stem) and stem != str(i)), None)
    if other is not None:
        raise UsageError(
            f"{first}: its keys can be indices or stems, and sample {other} is {source.keys[other]}; "
            "give --keys index, or --keys stem"
        )
    return Names(source, "index")


def some(values: Sequence[object]) -> str:
    """The first few values, and how many more there are."""
    more = f" and {len(values) - NAMED} more" if len(values) > NAMED else ""
    return ", ".join(map(str, values[:NAMED])) + more
