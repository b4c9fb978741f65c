"""However the work is cut up, a (view, sample) has the same pixels and the same targets, bit for bit."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_cli.data.idx import ArraySource
from distill_cli.data.loader import Batch, Batches, ListingOrder, Order, TrainingOrder, load
from distill_cli.data.views import DataConfig, resolve_view, train_transform
from distill_cli.replay import SparseRows
from distill_cli.store.plan import Plan
from distill_cli.store.reader import Store
from distill_cli.store.writer import StoreWriter

SAMPLES, VIEWS, EPOCHS = 15, 3, 4
MODEL = {"input_size": (3, 24, 24), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
RECIPES = {
    "tinyvit": {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "augment": "rrc"},
    "deit iii": {"auto_augment": "3a", "color_jitter": 0.3, "augment": "src"},
    "augmix": {"auto_augment": "augmix-m3-w3", "interpolation": "random", "augment": "rrc"},
    "by torch": {"auto_augment": "rand-m9-mstd0.5-inc1", "augment": "rrc", "resize": "torch"},
    "tensors": {"auto_augment": "trivial", "reprob": 0.5, "augment": "rrc", "decode": "torch"},
    "trivial": {"auto_augment": "trivial", "reprob": 0.1, "augment": "pad-crop"},
}
Target = tuple[bytes, ...]
"""Pixels, label and the teacher's row, as bytes."""


@pytest.fixture(scope="module")
def source(images: ArraySource) -> ArraySource:
    assert images.labels is not None
    return ArraySource(images.images[:SAMPLES], images.labels[:SAMPLES], images.classes)


@pytest.fixture(scope="module")
def store(
    make_plan: Callable[..., Plan],
    fill_store: Callable[..., StoreWriter],
    tmp_path_factory: pytest.TempPathFactory,
) -> Store:
    path = tmp_path_factory.mktemp("store")
    fill_store(path, make_plan(samples=SAMPLES, views=VIEWS, seed=5, first_view=2))
    return Store(path)


def _batches(source: ArraySource, store: Store, recipe: str, order: Order) -> Batches:
    transform = train_transform(resolve_view(DataConfig(**RECIPES[recipe]), MODEL))
    return Batches(source, transform, order, drawn=store.drawn, rows=SparseRows(store))


def _targets(batch: Batch) -> dict[tuple[int, int], Target]:
    assert batch.teacher is not None
    parts = (batch.images, batch.labels, batch.teacher.class_id, batch.teacher.log_prob, batch.teacher.log_tail)
    rows = zip(*(part.numpy() for part in parts), strict=True)
    return {
        (batch.view, sample): tuple(value.tobytes() for value in row)
        for sample, row in zip(batch.sample_ids.tolist(), rows, strict=True)
    }


@functools.cache
def _expected(recipe: str, source: "_Held", store: Store) -> dict[tuple[int, int], Target]:
    """One sample at a time."""
    one: Order = lambda number: (number // SAMPLES % VIEWS, np.array([number % SAMPLES]))  # noqa: E731
    found: dict[tuple[int, int], Target] = {}
    for number in range(SAMPLES * VIEWS):
        found |= _targets(_batches(source.source, store, recipe, one).load(number))
    return found


class _Held:
    """A source that can be a key."""

    def __init__(self, source: ArraySource) -> None:
        self.source = source


@pytest.fixture(scope="module")
def held(source: ArraySource) -> _Held:
    return _Held(source)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    recipe=st.sampled_from(sorted(RECIPES)),
    batch_size=st.integers(1, SAMPLES + 2),
    workers=st.integers(0, 2),
    ranks=st.integers(1, 3),
    stopped=st.floats(0, 1),
    seed=st.integers(0, 3),
)
def test_training(
    held: _Held, store: Store, recipe: str, batch_size: int, workers: int, ranks: int, stopped: float, seed: int
) -> None:
    """Some epochs by some ranks, stopped somewhere and gone on with by another number of workers."""
    expected = _expected(recipe, held, store)
    seen: list[tuple[int, int]] = []
    for rank in range(ranks):
        order = TrainingOrder(store.sample_ids, batch_size, seed, VIEWS, rank, ranks)
        steps = EPOCHS * order.steps_per_epoch
        stop, batches = round(stopped * steps), _batches(held.source, store, recipe, order)
        for numbers, many in ((range(stop), workers), (range(stop, steps), (workers + 1) % 3)):
            for batch in load(batches, numbers, many, torch.device("cpu")):
                found = _targets(batch)
                assert all(expected[place] == target for place, target in found.items())
                seen += found
    order = TrainingOrder(store.sample_ids, batch_size, seed, VIEWS)
    assert len(seen) == EPOCHS * order.steps_per_epoch * order.images_per_step


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    recipe=st.sampled_from(sorted(RECIPES)),
    batch_size=st.integers(1, SAMPLES + 2),
    workers=st.integers(0, 2),
    ranks=st.integers(1, 3),
)
def test_listing(held: _Held, store: Store, recipe: str, batch_size: int, workers: int, ranks: int) -> None:
    """An evaluation on a store's rows."""
    expected, found = _expected(recipe, held, store), {}
    for rank in range(ranks):
        order = ListingOrder(store.sample_ids, batch_size, rank, ranks)
        for batch in load(
            _batches(held.source, store, recipe, order), range(order.batches), workers, torch.device("cpu")
        ):
            found |= _targets(batch)
    assert found == {place: target for place, target in expected.items() if place[0] == 0}
