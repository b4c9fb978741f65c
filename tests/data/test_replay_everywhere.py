"""However the work is cut up, a (view, sample) has the same pixels and the same targets, bit for bit."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_cli.data import batches as batches_module
from distill_cli.data.batch import Batch
from distill_cli.data.batches import Batches
from distill_cli.data.idx import ArraySource
from distill_cli.data.loader import load
from distill_cli.data.mixing import Partners
from distill_cli.data.orders import ListingOrder, Order, TrainingOrder
from distill_cli.data.views import DataConfig, Transform, resolve_view, train_transform
from distill_cli.replay import SparseRows, stored_partners
from distill_cli.store.plan import Plan
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.writer import StoreWriter

# More workers than cores are asked for on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SAMPLES, VIEWS, EPOCHS = 15, 3, 4
SKIPPED = {1: (4, 9), 2: (4,)}
"""By view the samples that the capture could not read."""
MODEL = {"input_size": (3, 24, 24), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
RECIPES = {
    "tinyvit": {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "augment": "rrc"},
    "deit": {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "augment": "rrc", "mixup": 0.8, "cutmix": 1.0},
    "deit iii": {"auto_augment": "3a", "color_jitter": 0.3, "augment": "src", "mixup": 0.8, "cutmix": 1.0},
    "augmix": {"auto_augment": "augmix-m3-w3", "interpolation": "random", "augment": "rrc"},
    "by torch": {"auto_augment": "rand-m9-mstd0.5-inc1", "augment": "rrc", "resize": "torch"},
    "tensors": {"auto_augment": "trivial", "reprob": 0.5, "augment": "rrc", "decode": "torch"},
    "trivial": {"auto_augment": "trivial", "reprob": 0.1, "augment": "pad-crop"},
    "cutmix": {"augment": "none", "cutmix": 1.0, "mixup_prob": 0.7},
    "a smaller student of mixup": {"augment": "rrc", "mixup": 0.4, "reprob": 0.5},
}
Target = tuple[bytes, ...]
"""Pixels, label, the teacher's row, and the partner's label and lambda, as bytes."""
recipes = st.sampled_from(sorted(RECIPES))


@pytest.fixture(scope="module", autouse=True)
def _little_ahead() -> Iterator[None]:
    """Each loader process would read the rows of hundreds of epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "ROWS_AHEAD", 64)
        yield


@pytest.fixture(scope="module")
def source(images: ArraySource) -> ArraySource:
    assert images.labels is not None
    return ArraySource(images.images[:SAMPLES], images.labels[:SAMPLES], images.classes)


@pytest.fixture(scope="module")
def store(
    make_plan: Callable[..., Plan], make_rows: Callable[..., Rows], tmp_path_factory: pytest.TempPathFactory
) -> Store:
    path = tmp_path_factory.mktemp("store")
    writer = StoreWriter(path, make_plan(samples=SAMPLES, views=VIEWS, seed=5, first_view=2))
    for view, shard in writer.plan.every_shard():
        rows = make_rows(writer.plan, view, shard, SKIPPED.get(view, ()))
        writer.write(view, shard, rows, np.zeros(min(4, len(rows)), np.uint32))
    writer.finish()
    return Store(path)


def _seen(recipe: str, store: Store) -> tuple[Transform, Partners | None]:
    view = resolve_view(DataConfig(**RECIPES[recipe]), MODEL)  # type: ignore[arg-type]
    student = replace(view, image_size=18) if "student" in recipe else view
    return train_transform(view, student), stored_partners(store, view)


def _batches(source: ArraySource, store: Store, recipe: str, order: Order, views_per_read: int = 1) -> Batches:
    transform, partners = _seen(recipe, store)
    return Batches(
        source,
        transform,
        order,
        drawn=store.drawn,
        rows=SparseRows(store),
        views_per_read=views_per_read,
        partners=partners,
    )


def _targets(batch: Batch) -> dict[tuple[int, int], Target]:
    assert batch.teacher is not None
    parts = [batch.images, batch.labels, batch.teacher.class_id, batch.teacher.log_prob, batch.teacher.log_tail]
    parts += [batch.mixed.partner, batch.mixed.lam] if batch.mixed else []
    rows = zip(*(part.numpy() for part in parts), strict=True)
    views = np.repeat(batch.views, len(batch) // len(batch.views)).tolist()
    return {
        place: tuple(value.tobytes() for value in row)
        for place, row in zip(zip(views, batch.sample_ids.tolist(), strict=True), rows, strict=True)
    }


@functools.cache
def _expected(recipe: str, source: "_Held", store: Store) -> dict[tuple[int, int], Target]:
    """One sample at a time."""
    ids = store.sample_ids
    one: Order = lambda number: (number // len(ids) % VIEWS, ids[[number % len(ids)]])  # noqa: E731
    batches = _batches(source.source, store, recipe, one)
    found: dict[tuple[int, int], Target] = {}
    for number in range(len(ids) * VIEWS):
        found |= _targets(batches.load(number))
    return found


class _Held:
    """A source that can be a key."""

    def __init__(self, source: ArraySource) -> None:
        self.source = source


@pytest.fixture(scope="module")
def held(source: ArraySource) -> _Held:
    return _Held(source)


def test_recipes_that_mix_are_among_them(held: _Held, store: Store) -> None:
    """… in which some samples are mixed, and some whose partner was skipped are not."""
    for recipe, fields in RECIPES.items():
        lam = [np.frombuffer(target[-1], np.float32)[0] for target in _expected(recipe, held, store).values()]
        if "mixup" in fields or "cutmix" in fields:
            assert 0 < sum(value < 1 for value in lam) < len(lam)
    assert store.sample_ids.tolist() == [i for i in range(SAMPLES) if i not in (4, 9)]


@settings(max_examples=24, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    recipe=recipes,
    batch_size=st.integers(1, SAMPLES + 2),
    views_per_read=st.integers(1, 2),
    workers=st.integers(0, 4),
    ranks=st.integers(1, 3),
    stopped=st.floats(0, 1),
    seed=st.integers(0, 3),
)
def test_training(
    held: _Held,
    store: Store,
    recipe: str,
    batch_size: int,
    views_per_read: int,
    workers: int,
    ranks: int,
    stopped: float,
    seed: int,
) -> None:
    """Some epochs by some ranks, stopped somewhere and gone on with by another number of workers."""
    expected, partners = _expected(recipe, held, store), _seen(recipe, store)[1]
    seen: list[tuple[int, int]] = []
    orders = [
        TrainingOrder(store.sample_ids, batch_size * views_per_read, seed, VIEWS, rank, ranks, views_per_read, partners)
        for rank in range(ranks)
    ]
    steps = EPOCHS * orders[0].steps_per_epoch
    for order in orders:
        stop, batches = round(stopped * steps), _batches(held.source, store, recipe, order, views_per_read)
        for numbers, many in ((range(stop), workers), (range(stop, steps), (workers + 1) % 5)):
            for batch in load(batches, numbers, many, torch.device("cpu")):
                found = _targets(batch)
                assert all(expected[place] == target for place, target in found.items())
                seen += found
    assert len(seen) == steps * orders[0].images_per_step


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    recipe=recipes,
    batch_size=st.integers(1, SAMPLES + 2),
    workers=st.integers(0, 4),
    ranks=st.integers(1, 3),
)
def test_listing(held: _Held, store: Store, recipe: str, batch_size: int, workers: int, ranks: int) -> None:
    """An evaluation on a store's rows."""
    expected, found = _expected(recipe, held, store), {}
    for rank in range(ranks):
        order = ListingOrder(store.sample_ids, batch_size, rank, ranks, _seen(recipe, store)[1])
        for batch in load(
            _batches(held.source, store, recipe, order), range(order.batches), workers, torch.device("cpu")
        ):
            found |= _targets(batch)
    assert found == {place: target for place, target in expected.items() if place[0] == 0}
