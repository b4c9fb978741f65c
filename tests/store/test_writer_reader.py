import errno
import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.store.manifest import Manifest, read_manifest
from distill_cli.store.place import Folder
from distill_cli.store.plan import PROBES, Generation, Plan
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.shard import Shard
from distill_cli.store.writer import StoreWriter, check_plan

MakePlan = Callable[..., Plan]
MakeRows = Callable[..., Rows]
FillStore = Callable[..., StoreWriter]
PROBE = np.arange(PROBES, dtype=np.uint32)
SHARD = "view-000/shard-00001.h5"


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _same(one: Rows, other: Rows) -> bool:
    names = ("class_id", "log_prob", "log_tail", "count")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def _checked(path: Path, plan: Plan) -> Manifest | None:
    return check_plan(path, Generation(0, plan))


def _manifest(path: Path, plan: Plan) -> Manifest:
    found = read_manifest(Folder(path), Generation(0, plan))
    assert found is not None
    return found


def _expected(plan: Plan, make_rows: MakeRows, view: int, ids: np.ndarray) -> Rows:
    """The rows that were written of some samples, found by brute force."""
    shards = [make_rows(plan, view, shard) for shard in range(plan.shards)]
    at = [int(np.flatnonzero(np.concatenate([rows.sample_id for rows in shards]) == i)[0]) for i in ids]
    names = ("class_id", "log_prob", "log_tail", *(["count"] if plan.form.ragged else []))
    columns = {name: np.concatenate([getattr(rows, name) for rows in shards])[at] for name in names}
    columns["log_prob"] = columns["log_prob"].astype(np.float16)
    columns["log_tail"] = columns["log_tail"].astype(np.float32)
    return Rows(ids, **columns)


@pytest.fixture
def store(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> Path:
    fill_store(tmp_path / "store", make_plan())
    return tmp_path / "store"


@pytest.fixture(scope="module")
def two_views(tmp_path_factory: pytest.TempPathFactory, make_plan: MakePlan, fill_store: FillStore) -> Store:
    """103 samples, 11 shards a view."""
    path = tmp_path_factory.mktemp("two-views")
    fill_store(path, make_plan(samples=103, shard_rows=10, views=2))
    return Store(path)


# The writer.


@pytest.mark.parametrize("finished", [0, 1, 5])
def test_a_second_attempt_writes_what_is_missing_and_the_same_bytes(
    tmp_path: Path, make_plan: MakePlan, fill_store: FillStore, finished: int
) -> None:
    plan, labels = make_plan(views=2), np.arange(10) % 5
    fill_store(tmp_path / "one", plan, labels)
    fill_store(tmp_path / "two", plan, labels, only=finished)
    before = {path: path.stat().st_ino for path in (tmp_path / "two").rglob("*.h5")}
    fill_store(tmp_path / "two", plan, labels)
    assert _files(tmp_path / "two") == _files(tmp_path / "one")
    assert {path: path.stat().st_ino for path in before} == before
    assert len(before) == finished


def test_a_new_store_has_its_plan_before_its_shards_and_no_manifest(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan()
    writer = StoreWriter(tmp_path, plan)
    assert _files(tmp_path) == {"plan.json": plan.text.encode()}
    assert list(writer.missing()) == [(0, 0), (0, 1), (0, 2)]


def test_what_a_killed_writer_left_half_written_is_removed(
    tmp_path: Path, make_plan: MakePlan, fill_store: FillStore
) -> None:
    fill_store(tmp_path, make_plan(), only=2)
    for name in ("view-000/.tmp-shard-00001.h5", ".tmp-manifest.json"):
        (tmp_path / name).write_bytes(b"half")
    assert list(StoreWriter(tmp_path, make_plan()).missing()) == [(0, 2)]
    fill_store(tmp_path, make_plan())
    shards = [f"view-000/shard-{shard:05d}.h5" for shard in range(3)]
    assert sorted(_files(tmp_path)) == ["manifest.json", "plan.json", *shards]


def test_a_shard_that_does_not_open_is_written_again(
    tmp_path: Path, make_plan: MakePlan, fill_store: FillStore
) -> None:
    fill_store(tmp_path, make_plan(), only=2)
    (tmp_path / SHARD).write_bytes((tmp_path / SHARD).read_bytes()[:-1])
    assert list(StoreWriter(tmp_path, make_plan()).missing()) == [(0, 1), (0, 2)]


@pytest.mark.parametrize("only", [1, None])
def test_another_plan_is_refused_and_its_fields_named(
    tmp_path: Path, make_plan: MakePlan, fill_store: FillStore, only: int | None
) -> None:
    fill_store(tmp_path, make_plan(), only=only)
    before = _files(tmp_path)
    with pytest.raises(MismatchError, match=r"holds another store \(seed: 0, 1; top_k: 3, 2: there, asked\)") as caught:
        StoreWriter(tmp_path, make_plan(seed=1, top_k=2))
    assert caught.value.exit_code == 3
    assert _files(tmp_path) == before


def test_other_library_versions_are_the_same_store_only_when_it_is_complete(
    tmp_path: Path, make_plan: MakePlan, fill_store: FillStore
) -> None:
    newer = make_plan(software={"torch": "2.8.0"})
    fill_store(tmp_path, make_plan(), only=1)
    with pytest.raises(MismatchError, match=r"software.torch: 2.7.0, 2.8.0"):
        _checked(tmp_path, newer)
    fill_store(tmp_path, make_plan())
    assert _checked(tmp_path, newer) == _manifest(tmp_path, make_plan())


def test_a_complete_store_that_lost_a_shard_is_unfinished_again(store: Path, make_plan: MakePlan) -> None:
    """The advice of the reader's errors, to run teacher-logits again, must help."""
    assert _checked(store, make_plan()) is not None
    (store / SHARD).unlink()
    assert _checked(store, make_plan()) is None


def test_a_complete_store_with_a_shard_cut_short_is_unfinished_again(store: Path, make_plan: MakePlan) -> None:
    (store / SHARD).write_bytes((store / SHARD).read_bytes()[:100])
    assert _checked(store, make_plan()) is None


def test_the_manifest_counts_the_teachers_hits(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan(samples=4, shard_rows=4, top_k=5)
    writer = StoreWriter(tmp_path, plan, np.array([0, 1, 2, 3]))
    class_id = np.array([[0, 1, 2, 3, 4]] * 4)
    writer.write(0, 0, Rows(plan.dealing.sample_ids(0), class_id, np.zeros((4, 5)), np.zeros(4)), PROBE)
    manifest = writer.finish()
    assert (manifest.top1, manifest.top5) == (25.0, 100.0)
    assert (manifest.rows, manifest.bytes) == (4, (tmp_path / manifest.shards[0].path).stat().st_size)


@pytest.mark.parametrize("codec", [{}, {"codec": "compact", "bits": 8}])
def test_tars_of_one_sample_and_of_a_hundred_thousand_are_shards(
    tmp_path: Path, make_plan: MakePlan, codec: dict[str, object]
) -> None:
    sizes = (1, 100_000, 1)
    plan = make_plan(samples=sum(sizes), shard_sizes=sizes, shard_rows=100_000, top_k=1, **codec)
    writer = StoreWriter(tmp_path, plan)
    for shard, size in enumerate(sizes):
        ids = plan.dealing.sample_ids(shard)
        rows = Rows(ids, (ids % 5)[:, None], np.full((size, 1), -0.1), np.full(size, np.log1p(-np.exp(-0.1))))
        writer.write(0, shard, rows, PROBE[:size])
    assert [entry.rows for entry in writer.finish().shards] == [1, 100_000, 1]
    wanted = np.array([100_001, 0, 1, 54_321, 100_000])
    assert Store(tmp_path).rows(0, wanted).class_id[:, 0].tolist() == (wanted % 5).tolist()


def test_without_labels_the_manifest_claims_no_accuracy(store: Path, make_plan: MakePlan) -> None:
    manifest = _manifest(store, make_plan())
    assert (manifest.top1, manifest.top5) == (None, None)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_nothing_under_the_final_name(
    tmp_path: Path,
    make_plan: MakePlan,
    make_rows: MakeRows,
    fill_store: FillStore,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    writer = fill_store(tmp_path, make_plan(), only=1)
    before = _files(tmp_path)

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(code)):
        writer.write(0, 1, make_rows(writer.plan, 0, 1), PROBE)
    assert _files(tmp_path) == before
    assert list(writer.missing()) == [(0, 1), (0, 2)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system of 64 KiB cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_stops_the_writer_and_room_lets_it_go_on(
    small_disk: Path, make_plan: MakePlan, make_rows: MakeRows, fill_store: FillStore
) -> None:
    plan = make_plan(samples=4000, shard_rows=1000)
    with pytest.raises(OSError, match="No space left"):
        fill_store(small_disk, plan)
    there = _files(small_disk)
    assert sorted(there) == ["plan.json", "view-000/shard-00000.h5", "view-000/shard-00001.h5"]
    assert list(StoreWriter(small_disk, plan).missing()) == [(0, 2), (0, 3)]
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    fill_store(small_disk, plan)
    assert Store(small_disk).manifests[0].rows == 4000


# The reader.


def test_no_samples_have_no_rows(two_views: Store) -> None:
    rows = two_views.rows(0, np.array([], np.int64))
    assert (rows.class_id.shape, rows.log_prob.shape, rows.log_tail.shape) == ((0, 3), (0, 3), (0,))


@given(st.integers(0, 1), st.lists(st.integers(0, 102), max_size=60))
def test_rows_come_in_any_order_and_as_often_as_asked(
    two_views: Store, make_rows: MakeRows, view: int, ids: list[int]
) -> None:
    wanted = np.array(ids, np.int64)
    rows = two_views.rows(view, wanted)
    assert np.array_equal(rows.sample_id, wanted)
    assert _same(rows, _expected(two_views.plan, make_rows, view, wanted))


KINDS: list[dict[str, Any]] = [{"keep_mass": 0.9}, {"sample": 2, "top_k": 1}]


@pytest.fixture(scope="module")
def ragged(
    tmp_path_factory: pytest.TempPathFactory, make_plan: MakePlan, fill_store: FillStore
) -> list[tuple[Store, tuple[int, ...]]]:
    """Stores of ragged rows, 103 samples in 11 shards, and the samples that were skipped."""
    made = []
    for kind in KINDS:
        path, plan = tmp_path_factory.mktemp("ragged"), make_plan(samples=103, shard_rows=10, **kind)
        skip = (3, 77, *plan.dealing.sample_ids(4).tolist())
        fill_store(path, plan, skip=skip)
        made.append((Store(path), skip))
    return made


@given(st.integers(0, len(KINDS) - 1), st.lists(st.integers(0, 102), max_size=60))
def test_ragged_rows_come_in_any_order_and_as_often_as_asked(
    ragged: list[tuple[Store, tuple[int, ...]]], make_rows: MakeRows, kind: int, ids: list[int]
) -> None:
    store, skip = ragged[kind]
    wanted = np.array([i for i in ids if i not in skip], np.int64)
    rows = store.rows(0, wanted)
    assert _same(rows, _expected(store.plan, make_rows, 0, wanted))
    assert np.array_equal(rows.count, 1 + wanted % store.plan.form.width)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_ragged_store_without_some_samples_says_so(ragged: list[tuple[Store, tuple[int, ...]]], kind: int) -> None:
    store, skip = ragged[kind]
    assert store.manifests[0].skipped == tuple(sorted({*skip}))
    assert sorted([*store.sample_ids, *{*skip}]) == list(range(103))
    for sample in skip:
        with pytest.raises(DamagedError, match="no row"):
            store.rows(0, np.array([5, sample]))


class Counted(Store):
    """A store that counts the shards that anything holds."""

    def shard(self, view: int, shard: int) -> Shard:
        opened = super().shard(view, shard)
        refs = self.__dict__.setdefault("refs", [])
        refs.append(weakref.ref(opened.rows))
        self.__dict__["most"] = max(self.__dict__.get("most", 0), sum(ref() is not None for ref in refs))
        return opened


def test_memory_is_bounded_whatever_is_asked_at_once(two_views: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(103), 3))
    whole, size = two_views.rows(0, ids), two_views.entry(0, 0).bytes
    for memory, most in ((1, 1), (size * 3, 3)):
        small = Counted(two_views.place)
        monkeypatch.setattr(small, "memory", memory)
        for _ in range(2):
            assert _same(small.rows(0, ids), whole)
        assert small.__dict__["most"] == len(small._open) == most
    assert _same(Store(two_views.place, memory_mb=1).rows(0, ids), whole)


def test_a_skipped_sample_has_no_row_and_moves_no_other(
    tmp_path: Path, make_plan: MakePlan, make_rows: MakeRows, fill_store: FillStore
) -> None:
    plan = make_plan()
    skipped = (*plan.dealing.sample_ids(0)[[0, 2]].tolist(), int(plan.dealing.sample_ids(2)[-1]))
    fill_store(tmp_path, plan, skip=skipped)
    store = Store(tmp_path)
    assert store.manifests[0].skipped == tuple(sorted(skipped))
    assert sorted([*store.sample_ids, *skipped]) == list(range(10))
    ids = store.sample_ids[::-1]
    assert _same(store.rows(0, ids), _expected(plan, make_rows, 0, ids))
    for sample in skipped:
        with pytest.raises(DamagedError, match="no row for a sample that was asked for"):
            store.rows(0, np.array([sample]))


def test_a_shard_of_skipped_samples_only_is_empty(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    plan = make_plan()
    gone = plan.dealing.sample_ids(1)
    fill_store(tmp_path, plan, skip=tuple(gone.tolist()))
    store = Store(tmp_path)
    assert len(store.rows(0, store.sample_ids)) == 6
    with pytest.raises(DamagedError, match="no row"):
        store.rows(0, gone[:1])


@pytest.mark.parametrize("sample", [-1, 10, 2**40])
def test_a_sample_beyond_the_data_has_no_row(store: Path, sample: int) -> None:
    with pytest.raises(DamagedError, match="no row"):
        Store(store).rows(0, np.array([sample]))


def _read(store: Store, view: int, ids: np.ndarray) -> tuple[Rows, int]:
    """Rows, and how many shards, or files, the store had open before."""
    opened = len(store._open)
    files = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.exists()]
    opened += sum(path.is_relative_to(str(store)) for path in files)
    return store.rows(view, ids), opened


def test_a_store_reads_in_a_spawned_process_and_takes_no_open_shard_along(
    two_views: Store, other_process: ProcessPoolExecutor
) -> None:
    ids = np.arange(103)[::-7]
    here = two_views.rows(1, ids)
    there, opened = other_process.submit(_read, two_views, 1, ids).result()
    assert _same(here, there)
    assert opened == 0
    assert len(pickle.dumps(two_views)) < 10_000


def test_a_store_reads_in_a_forked_process(two_views: Store) -> None:
    ids = np.arange(103)
    here = two_views.rows(0, ids)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        assert _same(here, pool.submit(_read, two_views, 0, ids).result()[0])


def _read_with_640_files(path: Path, samples: int) -> int:
    """Read every row of a store where a process may have 640 files open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (640, limits[1]))
    try:
        return len(Store(path).rows(0, np.arange(samples)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_store_may_have_more_shards_than_a_process_has_files(
    tmp_path: Path,
    make_plan: MakePlan,
    make_rows: MakeRows,
    other_process: ProcessPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """300 epochs of ImageNet are 24,000 shards; a process may commonly open 1,024 files."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    writer = StoreWriter(tmp_path, make_plan(samples=700, shard_rows=1))
    for view, shard in writer.plan.every_shard():
        writer.write(view, shard, make_rows(writer.plan, view, shard), PROBE[:1])
    writer.finish()
    assert other_process.submit(_read_with_640_files, tmp_path, 700).result() == 700


def test_shards_open_when_they_are_asked_for(store: Path, make_plan: MakePlan) -> None:
    for number in (1, 2):
        (store / f"view-000/shard-{number:05d}.h5").unlink()
    assert len(Store(store).rows(0, make_plan().dealing.sample_ids(0))) == 4


def test_a_shard_is_opened_once(store: Path, make_plan: MakePlan) -> None:
    opened, ids = Store(store), make_plan().dealing.sample_ids(1)
    first = opened.rows(0, ids)
    (store / SHARD).unlink()
    assert _same(opened.rows(0, ids), first)


# Damage.


@given(st.data())
def test_one_flipped_bit_is_noticed_when_its_shard_is_first_asked_for(
    two_views: Store, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("flipped") / "store"
    shutil.copytree(str(two_views), path)
    content = bytearray((path / SHARD).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (path / SHARD).write_bytes(content)
    store = Store(path)
    assert len(store.rows(0, store.plan.dealing.sample_ids(0))) == 10
    with pytest.raises(DamagedError):
        store.rows(0, store.plan.dealing.sample_ids(1))


def test_a_flipped_bit_of_a_value_is_told_by_its_checksum(store: Path) -> None:
    content = bytearray((store / SHARD).read_bytes())
    rows = Store(store).shard(0, 1).rows
    content[bytes(content).index(rows.log_prob.tobytes())] ^= 1
    (store / SHARD).write_bytes(content)
    with pytest.raises(DamagedError, match="its sha256 is not the manifest's") as caught:
        Store(store).shard(0, 1)
    assert caught.value.exit_code == 4


def test_shards_that_two_stores_swapped_are_refused(
    store: Path, tmp_path: Path, make_plan: MakePlan, fill_store: FillStore
) -> None:
    fill_store(tmp_path / "other", make_plan(seed=1))
    shutil.copy(tmp_path / "other" / SHARD, store / SHARD)
    with pytest.raises(DamagedError, match=SHARD):
        Store(store).rows(0, np.arange(10))


def test_shards_that_two_views_swapped_are_refused(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    fill_store(tmp_path, make_plan(views=2))
    shutil.copy(tmp_path / SHARD.replace("view-000", "view-001"), tmp_path / SHARD)
    with pytest.raises(DamagedError, match=SHARD):
        Store(tmp_path).rows(0, np.arange(10))


def test_a_manifest_of_another_store_is_refused(
    store: Path, tmp_path: Path, make_plan: MakePlan, fill_store: FillStore
) -> None:
    fill_store(tmp_path / "other", make_plan(seed=1))
    shutil.copy(tmp_path / "other" / "manifest.json", store)
    with pytest.raises(DamagedError, match="belongs to store"):
        Store(store)


def test_a_shard_that_is_gone_is_named(store: Path) -> None:
    (store / SHARD).unlink()
    with pytest.raises(DamagedError, match=f"{SHARD}: missing; run the same"):
        Store(store).rows(0, np.arange(10))


def test_an_unfinished_store_does_not_open(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    fill_store(tmp_path, make_plan(), only=2)
    with pytest.raises(DamagedError, match="1 of 3 shards missing"):
        Store(tmp_path)
