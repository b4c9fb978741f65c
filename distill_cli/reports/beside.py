"""The student beside its teacher: on a sample of the store's rows, with the images of the largest disagreements."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill_cli.data.images import UnreadableImage
from distill_cli.distributed import World
from distill_cli.errors import DamagedError, MismatchError, UsageError
from distill_cli.evaluate import Evaluation, open_evaluation, stored_batches
from distill_cli.metrics import Compared, compare
from distill_cli.pictures import colours, data_uri
from distill_cli.randomness import derive
from distill_cli.recipe import Recipe, update
from distill_cli.report import Report
from distill_cli.reports.run import Run
from distill_cli.store.reader import Store

SAMPLES = 2000
EXAMPLES = 24
"""Disagreements that are shown."""
SIDE = 192
"""Pixels of the longer side of their images at most."""


@dataclass(frozen=True)
class Example:
    """A row with its images, as addresses of themselves."""

    row: int
    """Its place among the compared rows."""
    key: str
    image: str
    """As it lies in the data."""
    seen: str
    """As the student saw it."""


@dataclass(frozen=True)
class Beside:
    """What could be compared, and why not more."""

    note: str | None
    """Why there are no rows."""
    store: Store | None = None
    split: str = ""
    """`train` or `val`: of which images the store is."""
    rows: Compared | None = None
    examples: tuple[Example, ...] = ()


def look(run: Run, world: World, report: Report, data: str | None, stores: Sequence[str], samples: int) -> Beside:
    """Compare a finished run with the rows of its store.

    Args:
        data, stores: instead of those of the run's recipe.

    Raises:
        UsageError, MismatchError, DamagedError: `data` or `stores` are given and do not fit.
    """
    if not stores and run.recipe.store.path is None:
        return Beside("The student was trained without a store, so there is no teacher to compare it with.")
    if not run.finished:
        return Beside("The run is under way: student and teacher are compared when it is finished.")
    try:
        opened = open_evaluation(_recipe(run.recipe, data, stores), str(run.path), world, report)
        assert opened.store is not None
        return _look(opened, opened.store, world, report, samples)
    except (UsageError, MismatchError, DamagedError, UnreadableImage) as error:
        if data is not None or stores:
            raise
        report.warn(f"student and teacher are not compared: {error}")
        return Beside(f"Student and teacher could not be compared: {error}")


def _recipe(of_run: Recipe, data: str | None, stores: Sequence[str]) -> Recipe:
    """The recipe of an evaluation: the run's data and stores, or those that are given."""
    names = ("path", "val", "root", "labelled", "cache_listing") if data is None else ("labelled", "cache_listing")
    settled = {f"data.{name}": getattr(of_run.data, name) for name in names}
    of_store = ("trust", "cache", "cache_gb", "memory_mb", "weights", "average", "class_maps")
    kept = {f"store.{name}": getattr(of_run.store, name) for name in of_store}
    given = {"data.path": data} if data is not None else {}
    return update(Recipe(), {**settled, **kept, **given, "store.path": stores or of_run.store.path})


def _look(opened: Evaluation, store: Store, world: World, report: Report, samples: int) -> Beside:
    known = store.sample_ids
    chosen = np.random.default_rng(derive("report", len(known))).permutation(len(known))[:samples]
    sample_ids = known[np.sort(chosen)]
    report.stage(f"comparing student and teacher on {len(sample_ids)} rows of {store}")
    with report.progress("rows", len(sample_ids)) as progress:
        rows = compare(opened.frozen.model, stored_batches(opened, store, sample_ids, world), world, progress)
    furthest = np.argsort(-rows.kl, kind="stable")[:EXAMPLES]
    return Beside(None, store, opened.stored_split, rows, tuple(_examples(opened, store, rows, furthest, world)))


def _examples(
    opened: Evaluation, store: Store, rows: Compared, chosen: NDArray[np.int64], world: World
) -> Iterator[Example]:
    assert opened.stored is not None
    source, view = opened.stored, opened.view
    seen: dict[int, Image.Image] = {}
    for batch in stored_batches(opened, store, np.sort(rows.sample_ids[chosen]), world):
        pictures = colours(batch.images, view.mean, view.std)
        seen |= dict(zip(batch.sample_ids.tolist(), map(Image.fromarray, pictures), strict=True))
    for row in chosen.tolist():
        sample_id = int(rows.sample_ids[row])
        try:
            image = data_uri(source.read(sample_id), SIDE)
        except UnreadableImage:
            continue
        yield Example(row, source.keys[sample_id], image, data_uri(seen[sample_id], SIDE))
