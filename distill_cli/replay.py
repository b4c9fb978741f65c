"""The proof that a store and some images belong together: same listing, same classes, same pixels."""

import numpy as np
import torch
from numpy.typing import NDArray

from distill_cli.data.sources import Source, check_classes, fingerprint
from distill_cli.data.views import Transform, checksum
from distill_cli.errors import MismatchError
from distill_cli.randomness import preserved
from distill_cli.software import versions
from distill_cli.sparse import SparseLogits
from distill_cli.store.reader import Store


def check_data(store: Store, source: Source) -> None:
    """Refuse images that are not the ones a store was written from.

    Raises:
        MismatchError: other classes, another number of images, other names or other labels.
    """
    plan = store.plan
    classes = plan.teacher["classes"]
    check_classes(source, f"store {store.path}", plan.num_classes, classes and tuple(classes))
    advice = "give the data that the store was written from"
    if len(source) != plan.samples:
        raise MismatchError(f"store {store.path}: is of {plan.samples} images, the data has {len(source)}; {advice}")
    found = fingerprint(source)
    for part in ("keys", "labels"):
        ours, theirs = plan.data[f"{part}_sha256"], found[f"{part}_sha256"]
        if ours and theirs and ours != theirs:
            raise MismatchError(
                f"store {store.path}: {part} fingerprint {ours[:12]}, that of the data {theirs[:12]}; {advice}"
            )


def prove_replay(store: Store, source: Source, transform: Transform) -> int:
    """Replay the first inputs of the first and of the last shard and compare their checksums; gives their number.

    Raises:
        MismatchError: an input differs; libraries of other versions than the store's are named.
    """
    plan = store.plan
    proven = 0
    for view, shard in dict.fromkeys([(0, 0), (plan.views - 1, plan.shards - 1)]):
        opened = store.shard(view, shard)
        for sample_id, expected in zip(opened.rows.sample_id.tolist(), opened.probe_crc.tolist(), strict=False):
            with preserved():
                found = checksum(transform([source.read(sample_id)], plan.seed, view, [sample_id])[0])
            if found != expected:
                raise MismatchError(
                    f"store {store.path}: view {view} of {source.keys[sample_id]} does not replay to the pixels that "
                    f"the teacher saw; {_cause(plan.software)}"
                )
            proven += 1
    return proven


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
        )


def _cause(software: object) -> str:
    assert isinstance(software, dict)
    here = versions()
    other = [f"{name} {was} there, {here.get(name)} here" for name, was in software.items() if here.get(name) != was]
    if other:
        return f"versions differ: {', '.join(other)}; install those of the store"
    return "the library versions are the store's, so the image files have changed; restore them, or write a new store"
