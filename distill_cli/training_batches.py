"""The batches that a student is trained on, by step."""

from collections.abc import Iterator

from distill_cli.data.batch import Batch
from distill_cli.data.batches import Batches
from distill_cli.data.loader import load
from distill_cli.data.orders import TrainingOrder
from distill_cli.data.sources import Source
from distill_cli.data.views import Transform
from distill_cli.distributed import World
from distill_cli.errors import DistillError
from distill_cli.experiment import Experiment
from distill_cli.recipe import Recipe
from distill_cli.replay import SparseRows
from distill_cli.store.reader import Store


def training_batches(setup: Experiment, start: int, stop: int, world: World) -> Iterator[Batch]:
    """This rank's batches of some steps, on its device.

    Raises:
        DistillError: an image cannot be decoded, or none of a batch, though unreadable ones are skipped.
    """
    batches = by_step(setup.recipe, setup.source, setup.transform, setup.order, setup.store)
    for batch in load(batches, range(start, stop), world.workers, world.device):
        if len(batch) == 0:
            raise DistillError(f"{batch.skipped[0]}; no image of its batch could be decoded")
        yield batch


def by_step(recipe: Recipe, source: Source, transform: Transform, order: TrainingOrder, store: Store | None) -> Batches:
    """Step -> batch, by the views and with the rows of a store, where there is one."""
    return Batches(
        source,
        transform,
        order,
        seed=recipe.train.seed,
        drawn=store.drawn if store else None,
        rows=SparseRows(store) if store else None,
        views_per_read=recipe.train.views_per_read,
        skip_unreadable=recipe.data.skip_unreadable,
        partners=order.partners,
    )
