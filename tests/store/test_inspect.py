from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distill_cli.errors import DamagedError
from distill_cli.locks import shared
from distill_cli.report import Report
from distill_cli.store.inspect import ALL, ENDS, Inspection
from distill_cli.store.inspect import inspect as inspect_aloud
from distill_cli.store.place import Folder
from distill_cli.store.plan import PROBES, Plan
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.writer import StoreWriter

MakePlan = Callable[..., Plan]
MakeRows = Callable[..., Rows]
FillStore = Callable[..., StoreWriter]


def inspect(path: Path, shards: int = ENDS) -> Inspection:
    return inspect_aloud(Folder(path), shards, Report(quiet=True))


def test_a_complete_store_says_who_and_how_much(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    plan, labels = make_plan(views=2, num_classes=8, top_k=6), np.arange(10) % 5
    manifest = fill_store(tmp_path, plan, labels, skip=(3,)).finish()
    found = inspect(tmp_path, ALL)
    assert (found.state, found.store_id, found.writer) == ("complete", plan.sha256, None)
    assert (found.rows, found.bytes, found.skipped) == (18, manifest.bytes, 1)
    assert (found.top1, found.top5) == (manifest.top1, manifest.top5)
    assert (found.shards, found.shards_there, found.shards_read, found.rows_read) == (6, 6, 6, 18)
    assert found.generations[0].missing == ()


def test_masses_are_those_of_the_rows(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    plan = make_plan(samples=103, shard_rows=10, num_classes=30, top_k=12)
    fill_store(tmp_path, plan)
    found = inspect(tmp_path, ALL)
    rows = Store(tmp_path).rows(0, np.arange(103))
    held = np.exp(rows.log_prob.astype(np.float64)).cumsum(axis=1)
    held /= held[:, -1:] + np.exp(rows.log_tail.astype(np.float64))[:, None]
    assert [each.k for each in found.mass] == [1, 2, 5, 10, 12]
    for each in found.mass:
        assert each.mean == pytest.approx(held[:, each.k - 1].mean(), abs=1e-6)
        for q, value in each.percentiles.items():
            expected = np.percentile(held[:, each.k - 1], int(q), method="inverted_cdf")
            assert value == pytest.approx(expected, abs=1e-5)


def test_first_classes_are_counted(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    teacher = {"name": "vit", "weights_sha256": "0" * 64, "num_classes": 5, "classes": list("abcde")}
    fill_store(tmp_path, make_plan(samples=50, teacher=teacher))
    found = inspect(tmp_path, ALL)
    counted = Counter(Store(tmp_path).rows(0, np.arange(50)).class_id[:, 0].tolist())
    assert {each.class_id: each.rows for each in found.first} == counted
    assert [each.rows for each in found.first] == sorted(counted.values(), reverse=True)
    assert {each.class_id: each.name for each in found.first} == {each: "abcde"[each] for each in counted}
    assert found.never_first == 5 - len(counted)


@pytest.mark.parametrize(("shards", "read"), [(ENDS, 6), (ALL, 22), (1, 1), (5, 5), (100, 22)])
def test_only_so_many_shards_are_read(
    tmp_path: Path, make_plan: MakePlan, fill_store: FillStore, shards: int, read: int
) -> None:
    fill_store(tmp_path, make_plan(samples=103, shard_rows=10, views=2))
    assert inspect(tmp_path, shards).shards_read == read


def test_an_unfinished_store_says_what_is_there(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    fill_store(tmp_path, make_plan(views=2), np.arange(10) % 5, only=4)
    found = inspect(tmp_path)
    assert (found.state, found.shards_there, found.rows) == ("unfinished", 4, 14)
    assert found.generations[0].missing == ("view-001/shard-00001.h5", "view-001/shard-00002.h5")
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.h5"))
    assert found.top1 is not None
    assert found.shards_read == 4


def test_a_store_with_nothing_yet_has_no_masses(tmp_path: Path, make_plan: MakePlan) -> None:
    StoreWriter(tmp_path, make_plan(samples=2**60, views=1000, shard_rows=1))
    found = inspect(tmp_path)
    assert (found.rows, found.mass, found.first, len(found.generations[0].missing)) == (0, (), (), 1000)


def test_a_writer_at_work_is_named(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    fill_store(tmp_path, make_plan(), only=1)
    with shared(tmp_path):
        assert inspect(tmp_path).writer == "this process"


def test_a_damaged_shard_is_named_and_the_others_read(
    tmp_path: Path, make_plan: MakePlan, fill_store: FillStore
) -> None:
    fill_store(tmp_path, make_plan())
    path = tmp_path / "view-000/shard-00001.h5"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    found = inspect(tmp_path)
    assert list(found.damaged) == ["view-000/shard-00001.h5"]
    assert (found.shards_read, found.rows_read) == (2, 6)


def test_ragged_rows_say_how_many_classes_they_have(tmp_path: Path, make_plan: MakePlan, make_rows: MakeRows) -> None:
    plan = make_plan(keep_mass=0.9)
    writer = StoreWriter(tmp_path, plan)
    for view, shard in plan.every_shard():
        rows = make_rows(plan, view, shard)
        count = np.arange(len(rows)) % 3 + 1
        padded = np.arange(3) >= count[:, None]
        rows = Rows(
            rows.sample_id,
            np.where(padded, 0, rows.class_id),
            np.where(padded, -np.inf, rows.log_prob),
            rows.log_tail,
            count,
        )
        writer.write(view, shard, rows, np.arange(min(PROBES, len(rows)), dtype=np.uint32))
    writer.finish()
    entries = inspect(tmp_path).entries
    assert entries is not None
    assert entries.mean == pytest.approx(np.mean([1, 2, 3, 1, 1, 2, 3, 1, 1, 2]), abs=1e-3)
    assert entries.percentiles == {"1": 1, "10": 1, "50": 1, "90": 3, "99": 3}


def test_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="this is not a store"):
        inspect(tmp_path)
