"""The batches of an experiment, by step."""

from collections.abc import Iterator

from distill_cli.data.loader import Batch, Batches, load
from distill_cli.distributed import World
from distill_cli.errors import DistillError
from distill_cli.experiment import Experiment
from distill_cli.replay import SparseRows


def training_batches(setup: Experiment, start: int, stop: int, world: World) -> Iterator[Batch]:
    """This rank's batches of some steps, on its device.

    Raises:
        DistillError: an image cannot be decoded, or none of a batch, though unreadable ones are skipped.
    """
    batches = Batches(
        setup.source,
        setup.transform,
        setup.order,
        seed=setup.recipe.train.seed,
        drawn=setup.store.drawn if setup.store else None,
        rows=SparseRows(setup.store) if setup.store else None,
        views_per_read=setup.recipe.train.views_per_read,
        skip_unreadable=setup.recipe.data.skip_unreadable,
        partners=setup.order.partners,
    )
    for batch in load(batches, range(start, stop), world.workers, world.device):
        if len(batch) == 0:
            raise DistillError(f"{batch.skipped[0]}; no image of its batch could be decoded")
        yield batch
