"""The proof that a store and some images belong together: same listing, same classes, same pixels."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from distill_cli.data.images import printable
from distill_cli.data.mixing import partners
from distill_cli.data.sources import Source, check_classes, fingerprint
from distill_cli.data.views import Transform, View, check_replayable, read_view, train_transform
from distill_cli.errors import MismatchError
from distill_cli.randomness import preserved
from distill_cli.software import versions
from distill_cli.sparse import SparseLogits
from distill_cli.store.reader import Store


def check_data(store: Store, source: Source) -> None:
    """Refuse images that are not the ones a store was written from.

    Raises:
        MismatchError: other classes, another number of images, other names or other labels; or the store was
            imported, and its views cannot be made of any images here.
    """
    plan = store.plan
    check_replayable(f"store {store}", plan.transform)
    check_classes(source, f"store {store}", store.num_classes, store.classes)
    advice = "give the data that the store was written from"
    if len(source) != plan.samples:
        raise MismatchError(f"store {store}: is of {plan.samples} images, the data has {len(source)}; {advice}")
    found = fingerprint(source)
    for part in ("keys", "labels"):
        ours, theirs = plan.data[f"{part}_sha256"], found[f"{part}_sha256"]
        if ours and theirs and ours != theirs:
            raise MismatchError(
                f"store {store}: {part} fingerprint {ours[:12]}, that of the data {theirs[:12]}; {advice}"
            )


def prove_replay(store: Store, source: Source, transform: Transform) -> int:
    """Replay the first inputs of the first and of the last shard and compare their checksums; gives their number.

    Of several stores each is proven, by the view of its own teacher.

    Raises:
        MismatchError: an input differs; libraries of other versions than the store's are named.
    """
    last = store.generation_of(store.views - 1)[0].plan.shards - 1
    ends = {(0, 0), (store.views - 1, last)}
    proven = sum(prove_shard(store, view, shard, source, transform) for view, shard in ends)
    views = (read_view(other.plan.transform, f"store {other}") for other in store.beside)
    beside = zip(store.beside, map(train_transform, views), strict=True)
    return proven + sum(prove_replay(other, source, seen) for other, seen in beside)


def prove_shard(store: Store, view: int, shard: int, source: Source, transform: Transform) -> int:
    """Replay the first inputs of one shard and compare their checksums; gives their number.

    Raises:
        MismatchError: as `prove_replay`.
    """
    plan = store.generation_of(view)[0].plan
    opened = store.shard(view, shard)
    seed, drawn = store.drawn[view]
    sample_ids = np.delete(plan.dealing.sample_ids(shard), opened.skipped)
    sample_ids = sample_ids[: len(opened.probe_crc)]
    others = StoredPartners(store)(view, sample_ids)
    for sample_id, other, expected in zip(sample_ids.tolist(), others.tolist(), opened.probe_crc.tolist(), strict=True):
        with preserved():
            found = transform.pixels_of(source, seed, drawn, sample_id).checksum(0)
            # The partner's own pixels are proven where it is a probe itself.
            mix = transform.mixing and transform.mixing(seed, drawn, sample_id, other)
            found = mix.checksum(found) if mix else found
        if found != expected:
            raise MismatchError(
                f"store {store}: view {view} of {printable(source.keys[sample_id])} does not replay to the pixels that "
                f"the teacher saw; {_cause(store, plan.software)}"
            )
    return len(opened.probe_crc)


@dataclass(frozen=True)
class StoredPartners:
    """The partners that a store's samples had; nobody's is one that the capture could not read."""

    store: Store
    offset: int = 0
    """The view of the store that is called 0."""
    final = True

    def __call__(self, view: int, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        view += self.offset
        dealing = self.store.generation_of(view)[0].plan.dealing
        found = partners(dealing, *self.store.drawn[view], sample_ids)
        there = np.flatnonzero(found >= 0)
        found[there[self.store.lacks(view, found[there])]] = -1
        return found


def stored_partners(store: Store, view: View, offset: int = 0) -> StoredPartners | None:
    """The partners of a store whose transform is `view`; None where nothing is mixed."""
    return StoredPartners(store, offset) if view.mixes else None


class SparseRows:
    """A store's rows as tensors, for the loader; a class, so that it pickles into spawned workers."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self, view: int, sample_ids: NDArray[np.int64]) -> SparseLogits:
        rows = self.store.rows(view, sample_ids)
        return SparseLogits(
            torch.from_numpy(rows.class_id.astype(np.int64)),
            torch.from_numpy(rows.log_prob.astype(np.float32)),
            torch.from_numpy(rows.log_tail),
            None if rows.count is None else torch.from_numpy(rows.count),
        )


def _cause(store: Store, software: Mapping[str, str]) -> str:
    here = versions()
    other = [f"{name} {was} there, {here.get(name)} here" for name, was in software.items() if here.get(name) != was]
    if other:
        return f"versions differ: {', '.join(other)}; install those of the store"
    return (
        "the library versions are the store's, so the image files have changed: "
        f'"distill store check {store} --data DATA --files" names them; restore them, or write a new store'
    )
