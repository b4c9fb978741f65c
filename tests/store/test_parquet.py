import builtins
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distill_cli.errors import MismatchError, UsageError
from distill_cli.report import Report
from distill_cli.store.export_parquet import export_parquet
from distill_cli.store.merge import merge
from distill_cli.store.reader import Store
from distill_cli.store.writer import StoreWriter

Make = Callable[..., object]
QUIET = Report(quiet=True)


def check(path: Path, source: Store, views: list[int]) -> None:
    """A file holds the rows of these views, and no others."""
    table = pq.read_table(path).to_pydict()
    for view in views:
        here = [i for i, number in enumerate(table["view"]) if number == view]
        ids = np.array([table["sample_id"][i] for i in here])
        assert sorted(ids) == source.sample_ids.tolist()
        rows = source.rows(view, ids)
        for row, i in enumerate(here):
            k = rows.class_id.shape[1] if rows.count is None else rows.count[row]
            assert table["class_id"][i] == rows.class_id[row, :k].tolist()
            assert table["log_prob"][i] == rows.log_prob[row, :k].astype(np.float32).tolist()
            assert table["log_tail"][i] == rows.log_tail[row]
    assert set(table["view"]) == set(views)


@pytest.fixture
def source(tmp_path: Path, make_plan: Make, fill_store: Make) -> Store:
    """Three views of two plans, of other k."""
    fill_store(tmp_path / "a", make_plan(views=2), skip=(5,))
    fill_store(tmp_path / "b", make_plan(first_view=2, top_k=2), skip=(5,))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "store", QUIET)
    return Store(tmp_path / "store")


def test_one_file_of_all_views(source: Store, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    done = export_parquet(source, out, QUIET)
    assert (done.status, done.rows, done.views, done.files, done.bytes) == ("done", 27, 3, 1, out.stat().st_size)
    check(out, source, [0, 1, 2])
    file = pq.ParquetFile(out)
    assert file.num_row_groups == 9
    plans = [generation.plan.text for generation in source.generations]
    assert json.loads(file.schema_arrow.metadata[b"distill.plans"]) == plans
    assert file.schema_arrow.metadata[b"distill.store"] == source.id.encode()
    assert [str(field.type) for field in file.schema_arrow] == [
        "int32", "uint32", "list<element: uint16>", "list<element: float>", "float",
    ]  # fmt: skip
    assert export_parquet(source, out, QUIET).status == "already_done"


def test_a_file_of_each_view(source: Store, tmp_path: Path) -> None:
    out = tmp_path / "rows"
    assert export_parquet(source, out, QUIET).files == 3
    for view in range(3):
        check(out / f"view-{view:03d}.parquet", source, [view])
    (out / "view-001.parquet").unlink()
    assert export_parquet(source, out, QUIET).status == "done"
    check(out / "view-001.parquet", source, [1])


def test_ragged_rows_are_lists_of_their_own_length(tmp_path: Path, make_plan: Make, make_rows: Make) -> None:
    plan = make_plan(num_classes=70_000, keep_mass=0.9)
    (tmp_path / "store").mkdir()
    writer = StoreWriter(tmp_path / "store", plan)
    for view, shard in plan.every_shard():
        rows = make_rows(replace(plan, teacher={"num_classes": 5}), view, shard)
        count = np.arange(len(rows)) % 3 + 1
        gone = np.arange(3) >= count[:, None]
        class_id, log_prob = np.where(gone, 0, rows.class_id + 65_000), np.where(gone, -np.inf, rows.log_prob)
        rows = replace(rows, count=count, class_id=class_id, log_prob=log_prob)
        writer.write(view, shard, rows, np.zeros(0, np.uint32))
    writer.finish()
    export_parquet(Store(tmp_path / "store"), tmp_path / "x.parquet", QUIET)
    check(tmp_path / "x.parquet", Store(tmp_path / "store"), [0])
    assert str(pq.read_schema(tmp_path / "x.parquet").field("class_id").type) == "list<element: uint32>"


def test_a_file_of_another_store_is_refused(source: Store, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    export_parquet(Store(tmp_path / "a"), out, QUIET)
    with pytest.raises(
        MismatchError, match=r"rows.parquet: holds rows of another store \([0-9a-f]+, [0-9a-f]+: there, "
    ):
        export_parquet(source, out, QUIET)
    out.write_bytes(b"notes")
    with pytest.raises(MismatchError, match=r"rows.parquet: is there, and no Parquet"):
        export_parquet(source, out, QUIET)
    (tmp_path / "notes").write_text("")
    with pytest.raises(UsageError, match=r"notes: is a file; --out names a folder, or a file that ends in .parquet"):
        export_parquet(source, tmp_path / "notes", QUIET)


def test_a_failed_export_leaves_nothing(source: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, left = Store.rows, iter(range(4))

    def fails(*arguments: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return rows(*arguments)

    monkeypatch.setattr(Store, "rows", fails)
    with pytest.raises(KeyboardInterrupt):
        export_parquet(source, tmp_path / "out" / "rows.parquet", QUIET)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_pyarrow_there_is_one_line(source: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def missing(name: str, *arguments: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return there(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"export parquet needs pyarrow: pip install 'distill-cli\[parquet\]'"):
        export_parquet(source, tmp_path / "x.parquet", QUIET)
