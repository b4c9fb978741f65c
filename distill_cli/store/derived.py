"""A new store of several generations, made from others: what `merge`, `trim` and `import` have in common.

All plans are written first, then the shards, then the manifests from the last to the first. A reader takes generations
as long as they are complete, so that before the first manifest, which is the last file, nothing is there for it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import MismatchError
from distill_cli.files import check_ours
from distill_cli.store.manifest import Manifest
from distill_cli.store.place import Folder
from distill_cli.store.plan import Generation, Plan, numbered
from distill_cli.store.writer import StoreWriter, check_plan

MARKS = (numbered("plan", 0), numbered("manifest", 0))


def one_behind_the_other(plans: Sequence[Plan]) -> list[Generation]:
    """The generations of a store of these plans."""
    found: list[Generation] = []
    for number, plan in enumerate(plans):
        found.append(Generation(number, plan, sum(before.views for before in plans[:number])))
    return found


def complete(out: Path, generations: Sequence[Generation]) -> list[Manifest] | None:
    """The manifests of the store at `out`, where it is this one and complete; None where it is still to be filled.

    Raises:
        UsageError: `out` is not empty and no store.
        MismatchError: it is another store; the differing fields are named.
    """
    check_ours(out, MARKS, "store")
    there = 0
    while Folder(out).has(numbered("plan", there)):
        there += 1
    manifests = [check_plan(out, generation) for generation in generations]
    # Fewer plans are those of a killed command, unless the first manifest, its last file, is there.
    if there > len(generations) or (there < len(generations) and Folder(out).has(numbered("manifest", 0))):
        raise MismatchError(
            f"{out}: holds another store (generations: {there}, {len(generations)}: there, asked); choose another --out"
        )
    found = [manifest for manifest in manifests if manifest is not None]
    return found if len(found) == len(generations) else None


def begin(out: Path, generations: Sequence[Generation], labels: NDArray[np.int64] | None = None) -> list[StoreWriter]:
    """Write the plans; the caller holds the directory's lock, and has asked `complete`."""
    # Without it the store is unfinished, whichever of its generations lost a shard.
    (out / MARKS[1]).unlink(missing_ok=True)
    return [StoreWriter(out, generation, labels) for generation in generations]


def finish(writers: Sequence[StoreWriter]) -> list[Manifest]:
    """Write the manifests, that of the first generation last."""
    return [writer.finish() for writer in reversed(writers)][::-1]
