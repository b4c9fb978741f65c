"""Rows are read for several batches at once; nobody can tell."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distill_cli.data import batches as batches_module
from distill_cli.data.batches import Batches
from distill_cli.data.idx import ArraySource
from distill_cli.data.loader import load
from distill_cli.data.orders import ListingOrder, TrainingOrder
from distill_cli.data.views import DataConfig, eval_transform, resolve_view
from distill_cli.replay import SparseRows
from distill_cli.sparse import SparseLogits
from distill_cli.store.plan import Plan
from distill_cli.store.reader import Store

INPUT = {"input_size": (3, 28, 28), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
TRANSFORM = eval_transform(resolve_view(DataConfig(), INPUT))


class Counted:
    """Rows that count how often they are asked for."""

    def __init__(self, rows: SparseRows) -> None:
        self.rows, self.asked = rows, list[tuple[int, int]]()

    def __call__(self, view: int, ids: NDArray[np.int64]) -> SparseLogits:
        self.asked.append((view, len(ids)))
        return self.rows(view, ids)


@pytest.fixture
def rows(tmp_path: Path, make_plan: Callable[..., Plan], fill_store: Callable[..., object]) -> Counted:
    fill_store(tmp_path, make_plan(samples=60, shard_rows=16, views=2))
    return Counted(SparseRows(Store(tmp_path)))


def _same(one: SparseLogits | None, other: SparseLogits) -> bool:
    return one is not None and torch.equal(one.class_id, other.class_id) and torch.equal(one.log_prob, other.log_prob)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ahead", [1, 30, 8192])
def test_each_batch_has_its_own_rows(
    images: ArraySource, rows: Counted, monkeypatch: pytest.MonkeyPatch, workers: int, ahead: int
) -> None:
    monkeypatch.setattr(batches_module, "ROWS_AHEAD", ahead)
    order = TrainingOrder(np.arange(60), 10, seed=0, views=2)
    batches = Batches(images, TRANSFORM, order, rows=rows)
    for number, batch in enumerate(load(batches, range(3, 15), workers, torch.device("cpu")), 3):
        assert _same(batch.teacher, rows.rows(*order(number)))


def test_a_call_has_the_rows_of_several_batches_of_one_view(
    images: ArraySource, rows: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "ROWS_AHEAD", 40)
    batches = Batches(images, TRANSFORM, TrainingOrder(np.arange(60), 10, seed=0, views=2), rows=rows)
    for number in range(4, 8):
        batches.load(number)
    assert rows.asked == [(0, 20), (1, 20)]


def test_rows_of_one_batch_hold_no_memory_of_others(images: ArraySource, rows: Counted) -> None:
    batch = Batches(images, TRANSFORM, ListingOrder(np.arange(60), 10), rows=rows).load(0)
    assert batch.teacher is not None
    assert batch.teacher.class_id.untyped_storage().nbytes() == batch.teacher.class_id.nbytes


def test_batches_in_any_order_have_their_rows(images: ArraySource, rows: Counted) -> None:
    order = ListingOrder(np.arange(60), 10)
    batches = Batches(images, TRANSFORM, order, rows=rows)
    for number in (5, 0, 3, 3, 1):
        assert _same(batches.load(number).teacher, rows.rows(*order(number)))
