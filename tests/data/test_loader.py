import gc
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.data import batches as batches_module
from distill_cli.data import open_source
from distill_cli.data.batch import Batch
from distill_cli.data.batches import AHEAD, Batches, SharedBytes
from distill_cli.data.idx import ArraySource
from distill_cli.data.loader import Loader, _begin_worker, load
from distill_cli.data.orders import ListingOrder, Order, TrainingOrder, windowed
from distill_cli.data.sources import Source, UnreadableImage, without_labels
from distill_cli.data.views import DataConfig, Transform, resolve_view, train_transform
from distill_cli.errors import DistillError
from distill_cli.randomness import preserved, seed_everything
from distill_cli.replay import SparseRows
from distill_cli.sparse import SparseLogits
from distill_cli.store.plan import Plan
from distill_cli.store.reader import Store
from distill_cli.store.writer import StoreWriter

CPU = torch.device("cpu")
SIZES = st.integers(1, 200)


@pytest.fixture(scope="module")
def source(image_folder: Path) -> Source:
    found = open_source(str(image_folder), "train")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def transform() -> Transform:
    model = {"input_size": (3, 24, 24), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    config = DataConfig(augment="rrc", auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)
    return train_transform(resolve_view(config, {**model, "crop_pct": 1.0}))


@pytest.fixture(scope="module")
def batches(source: Source, transform: Transform) -> Batches:
    return Batches(source, transform, TrainingOrder(np.arange(18), 4, seed=1, views=2), seed=3)


def _loaded(batches: Batches, numbers: range, workers: int = 0) -> list[Batch]:
    return list(load(batches, numbers, workers, CPU))


def _same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and np.array_equal(one.sample_ids, other.sample_ids)
        and one.view == other.view
    )


def _epoch(order: TrainingOrder, epoch: int) -> np.ndarray:
    return np.concatenate([order(epoch * order.steps_per_epoch + step)[1] for step in range(order.steps_per_epoch)])


# Orders.


@given(SIZES, SIZES, st.integers(0, 5))
def test_an_epoch_has_each_sample_once_but_for_the_remainder(count: int, batch_size: int, epoch: int) -> None:
    ids = np.arange(count) * 3
    seen = _epoch(TrainingOrder(ids, batch_size, seed=0, views=1), epoch)
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(ids.tolist())
    assert count - len(seen) == (count % batch_size if count >= batch_size else 0)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    one, same, other = (TrainingOrder(np.arange(50), 7, seed, views=1) for seed in (1, 1, 2))
    assert np.array_equal(_epoch(one, 3), _epoch(same, 3))
    assert not np.array_equal(_epoch(one, 3), _epoch(one, 4))
    assert not np.array_equal(_epoch(one, 3), _epoch(other, 3))


@given(SIZES, SIZES, st.integers(0, 400), st.integers(1, 3))
def test_slices_of_the_ranks_are_the_global_batch(count: int, batch_size: int, step: int, ranks: int) -> None:
    def batch(rank: int, world_size: int) -> np.ndarray:
        return TrainingOrder(np.arange(count), batch_size, 0, 1, rank, world_size)(step)[1]

    assert np.array_equal(np.concatenate([batch(rank, ranks) for rank in range(ranks)]), batch(0, 1))
    assert len(batch(0, 1)) == TrainingOrder(np.arange(count), batch_size, 0, 1).images_per_step


TARS = st.lists(st.integers(0, 30), min_size=2, max_size=25).filter(any).map(tuple)
WINDOWS = st.integers(1, 30)


def _in_tars(tars: tuple[int, ...], window: int, batch_size: int = 1, **where: int) -> TrainingOrder:
    return TrainingOrder(np.arange(sum(tars)) * 3, batch_size, seed=0, views=1, tars=tars, window=window, **where)


@given(TARS, WINDOWS, SIZES, st.integers(0, 5))
def test_an_epoch_over_tars_has_each_sample_once(tars: tuple[int, ...], window: int, size: int, epoch: int) -> None:
    seen, ids = _epoch(_in_tars(tars, window, size), epoch).tolist(), (np.arange(sum(tars)) * 3).tolist()
    assert len(set(seen)) == len(seen) == len(ids) - (len(ids) % size if len(ids) >= size else 0)
    assert set(seen) <= set(ids)


@given(TARS, WINDOWS, st.integers(0, 5))
def test_only_a_window_of_tars_is_open_at_a_time(tars: tuple[int, ...], window: int, epoch: int) -> None:
    tar = np.repeat(np.arange(len(tars)), tars)[_epoch(_in_tars(tars, window), epoch) // 3]
    first, last = ({n: int(np.flatnonzero(tar == n)[end]) for n in set(tar.tolist())} for end in (0, -1))
    for place in range(len(tar)):
        assert sum(first[n] <= place <= last[n] for n in first) <= window


@given(TARS, st.integers(1, 25))
def test_no_tar_is_needed_again_by_a_cache_of_two_windows(tars: tuple[int, ...], window: int) -> None:
    """The least recently used goes first, as in the cache of fetched tars."""
    tar = np.repeat(np.arange(len(tars)), tars)[_epoch(_in_tars(tars, window), 0) // 3].tolist()
    kept, fetched = list[int](), list[int]()
    for number in tar:
        if number in kept:
            kept.remove(number)
        else:
            fetched.append(number)
        kept = [*kept, number][-2 * window :]
    assert len(fetched) == len(set(fetched))


@given(TARS, WINDOWS, SIZES, st.integers(0, 400), st.integers(1, 3))
def test_ranks_slice_the_batches_over_tars(
    tars: tuple[int, ...], window: int, size: int, step: int, ranks: int
) -> None:
    parts = [_in_tars(tars, window, size, rank=rank, world_size=ranks)(step)[1] for rank in range(ranks)]
    assert np.array_equal(np.concatenate(parts), _in_tars(tars, window, size)(step)[1])


def test_the_order_over_tars_is_a_function_of_seed_and_epoch() -> None:
    order = _in_tars((9,) * 12, 3, 7)
    assert np.array_equal(_epoch(order, 3), _epoch(_in_tars((9,) * 12, 3, 7), 3))
    assert not np.array_equal(_epoch(order, 3), _epoch(order, 4))
    assert not np.array_equal(_epoch(order, 3), _epoch(TrainingOrder(order.sample_ids, 7, 1, 1, tars=order.tars), 3))


@pytest.mark.parametrize("window", [0, 12, 50])
def test_a_window_of_all_tars_is_a_shuffle_of_all_samples(window: int) -> None:
    plain = TrainingOrder(np.arange(108), 7, seed=0, views=1)
    assert np.array_equal(_epoch(plain, 2) * 3, _epoch(_in_tars((9,) * 12, window, 7), 2))


def test_a_batch_over_tars_is_of_the_whole_window() -> None:
    """Also the first and the last of an epoch: no tar has more than a third of them."""
    tars, window = (1000,) * 50, 16
    tar = windowed(np.random.default_rng(0), tars, window) // 1000
    for start in (0, 25_000, 49_000):
        counts = np.bincount(tar[start : start + 1000], minlength=50)
        assert (counts > 0).sum() >= window
        assert counts.max() < 350
    assert len(set(tar[:100].tolist())) > 8


@given(st.integers(1, 4), st.integers(0, 100))
def test_epoch_e_reads_view_e_mod_views(views: int, step: int) -> None:
    order = TrainingOrder(np.arange(30), 10, seed=0, views=views)
    assert order(step)[0] == step // 3 % views


@given(SIZES, SIZES, st.integers(1, 4))
def test_a_listing_is_covered_exactly_by_any_batches_and_ranks(count: int, batch_size: int, ranks: int) -> None:
    seen: list[int] = []
    for rank in range(ranks):
        order = ListingOrder(np.arange(count) * 2, batch_size, rank, ranks)
        parts = [order(number) for number in range(order.batches)]
        assert all(view == 0 and 0 < len(ids) <= batch_size for view, ids in parts)
        seen += [i for _, ids in parts for i in ids.tolist()]
    assert sorted(seen) == [2 * i for i in range(count)]


# Batches.


def test_a_batch_holds_its_samples_labels_and_view(batches: Batches, source: Source) -> None:
    batch = batches.load(5)
    view, ids = batches.order(5)
    assert source.labels is not None
    assert (batch.view, batch.sample_ids.tolist()) == (view, ids.tolist())
    assert batch.labels.tolist() == source.labels[ids].tolist()
    assert (batch.labels.dtype, batch.images.shape) == (torch.int64, (4, 3, 24, 24))


def test_a_sample_does_not_depend_on_its_neighbours(batches: Batches, source: Source, transform: Transform) -> None:
    ids = batches.order(2)[1]
    alone = Batches(source, transform, lambda number: (0, ids[number : number + 1]), seed=3)
    assert torch.equal(batches.load(2).images, torch.cat([alone.load(i).images for i in range(4)]))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(batches: Batches, workers: int) -> None:
    expected, found = _loaded(batches, range(6)), _loaded(batches, range(6), workers)
    assert len(found) == 6
    assert all(_same(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("start", [1, 7])
def test_loading_can_start_anywhere(batches: Batches, start: int) -> None:
    whole, rest = _loaded(batches, range(9)), _loaded(batches, range(start, 9))
    assert all(_same(one, other) for one, other in zip(whole[start:], rest, strict=True))


def test_batches_leave_the_generators_alone(batches: Batches) -> None:
    with preserved():
        seed_everything(1)
        expected = random.random(), np.random.random(), torch.rand(2).tolist()
        seed_everything(1)
        batches.load(0)
        assert (random.random(), np.random.random(), torch.rand(2).tolist()) == expected


def test_several_views_begin_with_the_smaller_image(batches: Batches, transform: Transform) -> None:
    small = replace(batches, transform=replace(transform, short_side=30), views_per_read=2)
    loaded = small.load(0)
    for place, (view, sample_id) in enumerate(zip(np.repeat([0, 1], 4), loaded.sample_ids.tolist(), strict=True)):
        alone = small.transform([small.source.read(sample_id)], small.seed, int(view), [sample_id])[0]
        assert torch.equal(loaded.images[place], alone)


def test_data_without_labels_has_label_minus_one(batches: Batches, source: Source, transform: Transform) -> None:
    bare = Batches(without_labels(source), transform, batches.order, seed=3)
    assert bare.load(0).labels.tolist() == [-1] * 4
    assert torch.equal(bare.load(0).images, batches.load(0).images)


def test_images_of_an_array_load_without_a_warning(images: ArraySource, transform: Transform) -> None:
    batch = _loaded(Batches(images, transform, ListingOrder(np.arange(3), 2)), range(2))[-1]
    assert (len(batch), batch.sample_ids.tolist()) == (1, [2])


def test_a_batch_has_its_teachers_rows(
    tmp_path: Path,
    source: Source,
    transform: Transform,
    make_plan: Callable[..., Plan],
    fill_store: Callable[..., StoreWriter],
) -> None:
    fill_store(tmp_path, make_plan(samples=18, views=2))
    rows = SparseRows(Store(tmp_path))
    order = TrainingOrder(np.arange(18), 6, seed=0, views=2)
    for number, batch in enumerate(_loaded(Batches(source, transform, order, rows=rows), range(2, 5), workers=1), 2):
        expected = rows(*order(number))
        assert batch.teacher is not None
        assert torch.equal(batch.teacher.class_id, expected.class_id)
        assert torch.equal(batch.teacher.log_tail, expected.log_tail)


# What goes wrong.


@pytest.fixture
def damaged(image_folder: Path, tmp_path: Path) -> Source:
    """The images, sample 1 of which is empty."""
    shutil.copytree(image_folder, tmp_path / "images")
    source = open_source(str(tmp_path / "images"), "train")
    assert source is not None
    (tmp_path / "images" / "train" / source.keys[1]).write_bytes(b"")
    return source


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_the_work_with_its_one_line(
    damaged: Source, transform: Transform, workers: int
) -> None:
    batches = Batches(damaged, transform, ListingOrder(np.arange(18), 6))
    with pytest.raises(UnreadableImage, match=f"{damaged.keys[1]}: cannot be decoded") as caught:
        _loaded(batches, range(3), workers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_can_be_skipped_and_is_counted(damaged: Source, transform: Transform, workers: int) -> None:
    order = ListingOrder(np.arange(18), 6)
    loaded = _loaded(Batches(damaged, transform, order, skip_unreadable=True), range(3), workers)
    whole = Batches(damaged, transform, lambda _: (0, np.array([0, 2, 3, 4, 5]))).load(0)
    assert [len(batch.skipped) for batch in loaded] == [1, 0, 0]
    assert damaged.keys[1] in loaded[0].skipped[0]
    assert _same(loaded[0], whole)


def test_a_batch_of_unreadable_images_only_is_empty(damaged: Source, transform: Transform) -> None:
    only: Order = lambda _: (0, np.array([1]))  # noqa: E731
    batch = Batches(damaged, transform, only, skip_unreadable=True).load(0)
    assert (len(batch), len(batch.labels), len(batch.skipped)) == (0, 0, 1)


class _Dying(ArraySource):
    """A source whose worker is killed, as by the kernel when memory runs out."""

    def read(self, sample_id: int) -> object:  # type: ignore[override]
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_an_error_of_one_line(images: ArraySource, transform: Transform) -> None:
    dying = _Dying(images.images, images.labels, images.classes)
    with pytest.raises(DistillError, match=r"worker .* Run the same command again to go on") as caught:
        _loaded(Batches(dying, transform, ListingOrder(np.arange(4), 2)), range(2), workers=1)
    assert "\n" not in str(caught.value)


def test_a_worker_whose_parent_is_gone_before_it_begins_ends() -> None:
    reading, writing = os.pipe()

    def work() -> None:
        parent = os.getppid()
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)
        os.write(writing, b"an orphan")
        _begin_worker(0)
        os.write(writing, b" works")

    parent = os.fork()
    if parent == 0:
        multiprocessing.get_context("fork").Process(target=work).start()
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    os.waitpid(parent, 0)
    with os.fdopen(reading) as said:
        assert said.read() == "an orphan"


def test_workers_are_gone_as_soon_as_the_work_has_ended(damaged: Source, transform: Transform) -> None:
    """Left to the garbage collector they hold up whatever it runs in, by ten seconds."""
    before = set(multiprocessing.active_children())
    gc.disable()
    try:
        with pytest.raises(UnreadableImage):
            _loaded(Batches(damaged, transform, ListingOrder(np.arange(18), 6)), range(3), workers=2)
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


# Again and again.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_loads_again_by_the_same_processes_until_it_is_closed(batches: Batches, workers: int) -> None:
    before, expected = set(multiprocessing.active_children()), _loaded(batches, range(6))
    gc.disable()
    try:
        loader = Loader(batches, range(6), workers, CPU)
        for _ in range(2):
            broken_off = iter(loader)
            assert _same(next(broken_off), expected[0])
            broken_off.close()  # type: ignore[attr-defined]
            processes = set(multiprocessing.active_children()) - before
            assert len(processes) == workers
            found = list(loader)
            assert len(found) == 6
            assert all(_same(one, other) for one, other in zip(found, expected, strict=True))
            assert set(multiprocessing.active_children()) - before == processes
        loader.close()
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


def test_shared_memory_is_used_again_when_the_main_process_is_past_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "get_worker_info", lambda: "a worker")
    shared = SharedBytes()
    pieces = [shared.empty(count) for count in (12, 12, 12, 12, 5, 30)]
    places = [piece.data_ptr() for piece in pieces]
    assert [len(piece) for piece in pieces] == [12, 12, 12, 12, 5, 30]
    assert all(piece.is_shared() for piece in pieces)
    assert len(set(places[:3])) == AHEAD + 1 == 3
    assert places[3:5] == places[:2]
    assert places[5] not in places[:5]


# Several views a read.


@given(SIZES, SIZES, st.integers(1, 4), st.integers(0, 3))
def test_a_pass_reads_each_sample_once_for_several_views(count: int, batch_size: int, reads: int, number: int) -> None:
    batch_size *= reads
    order = TrainingOrder(np.arange(count), batch_size, seed=0, views=5, views_per_read=reads)
    steps = order._steps_per_pass
    parts = [order(number * steps + step) for step in range(steps)]
    seen = np.concatenate([ids for _, ids in parts])
    assert len(np.unique(seen)) == len(seen)
    assert {view for view, _ in parts} == {number * reads % 5}
    assert all(len(ids) * reads == order.images_per_step <= max(batch_size, reads * count) for _, ids in parts)
    if count >= order.images_per_step:
        # As many inputs as with one view a read, which is what an epoch counts.
        assert steps == reads * order.steps_per_epoch
        assert count - len(seen) < order.images_per_step


def test_without_several_views_the_order_is_what_it_was() -> None:
    one, plain = (TrainingOrder(np.arange(50), 7, 1, 3, **more) for more in ({"views_per_read": 1}, {}))
    assert all(np.array_equal(one(step)[1], plain(step)[1]) for step in range(30))
    assert one.steps_per_epoch == one._steps_per_pass == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_several_views_of_a_sample_are_each_as_alone(
    tmp_path: Path,
    source: Source,
    transform: Transform,
    make_plan: Callable[..., Plan],
    fill_store: Callable[..., StoreWriter],
    workers: int,
) -> None:
    fill_store(tmp_path, make_plan(samples=18, views=3, first_view=4))
    store = Store(tmp_path)
    rows = SparseRows(store)
    order = TrainingOrder(np.arange(18), 6, seed=0, views=3, views_per_read=2)
    batches = Batches(source, transform, order, drawn=store.drawn, rows=rows, views_per_read=2)
    counted = _Counted(source)
    assert len(_loaded(replace(batches, source=counted), range(6))) == 6
    assert sorted(counted.asked) == list(range(18))
    for number, batch in enumerate(_loaded(batches, range(9), workers)):
        first, ids = order(number)
        views = (first, (first + 1) % 3)
        assert (batch.views, batch.sample_ids.tolist()) == (views, 2 * ids.tolist())
        alone = [
            Batches(source, transform, lambda _, v=view, i=ids: (v, i), drawn=store.drawn, rows=rows).load(0)  # type: ignore[misc]
            for view in views
        ]
        assert torch.equal(batch.images, torch.cat([one.images for one in alone]))
        assert torch.equal(batch.labels, torch.cat([one.labels for one in alone]))
        assert batch.teacher is not None
        for part, of_one in zip(
            batch.teacher.parts, zip(*(one.teacher.parts for one in alone), strict=True), strict=True
        ):
            assert torch.equal(part, torch.cat(of_one))


def test_an_unreadable_image_is_left_out_of_all_its_views(damaged: Source, transform: Transform) -> None:
    only: Order = lambda _: (0, np.array([0, 1, 2]))  # noqa: E731
    batch = Batches(damaged, transform, only, rows=_numbered, views_per_read=2, skip_unreadable=True).load(0)
    assert (batch.sample_ids.tolist(), len(batch.skipped)) == ([0, 2, 0, 2], 1)
    assert batch.teacher is not None
    assert batch.teacher.class_id[:, 0].tolist() == [0, 2, 100, 102]


class _Counted:
    """A source that remembers what was read."""

    def __init__(self, source: Source) -> None:
        self.source, self.asked = source, list[int]()

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def read(self, sample_id: int) -> object:
        self.asked.append(sample_id)
        return self.source.read(sample_id)


def _numbered(view: int, ids: np.ndarray) -> SparseLogits:
    """Rows that say whose they are."""
    numbers = torch.from_numpy(ids) + 100 * view
    return SparseLogits(numbers[:, None], torch.zeros(len(ids), 1), torch.full((len(ids),), -torch.inf))
