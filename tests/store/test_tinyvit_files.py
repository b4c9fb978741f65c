"""TinyViT's files, beside a scalar reader and writer of its own that share no code with ours."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distill_cli.errors import DamagedError, MismatchError, UsageError
from distill_cli.report import Report
from distill_cli.store.export_tinyvit import export_tinyvit
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.tinyvit import (
    RankFile,
    RankWriter,
    RecordReader,
    epochs,
    record_dtype,
    to_records,
    to_rows,
    wrong_record,
)

Make = Callable[..., object]
QUIET = Report(quiet=True)
Record = tuple[int, list[int], list[float]]


def scalar_read(folder: Path, k: int) -> dict[str, Record]:
    """Key -> seed, class ids, probabilities."""
    found = {}
    for keys in sorted(folder.glob("rank*-keys.txt")):
        content = keys.with_name(keys.name.replace("keys.txt", "values.bin")).read_bytes()
        for number, key in enumerate(keys.read_text().splitlines()):
            values = struct.unpack_from(f"<i{k}h{k}e", content, number * (4 + 4 * k))
            found[key] = (values[0], [i % 65536 for i in values[1 : k + 1]], list(values[k + 1 :]))
    return found


def scalar_write(folder: Path, rank: int, records: dict[str, Record]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wrapped = [
        struct.pack(f"<i{len(ids)}h{len(p)}e", seed, *[i - 65536 if i > 32767 else i for i in ids], *p)
        for seed, ids, p in records.values()
    ]
    (folder / f"rank{rank}-keys.txt").write_text("".join(f"{key}\n" for key in records))
    (folder / f"rank{rank}-values.bin").write_bytes(b"".join(wrapped))


def random_records(n: int, k: int, classes: int, seed: int = 0) -> np.ndarray:
    """As a softmax in float16 gives them; some add up to more than 1."""
    generator = np.random.default_rng(seed)
    prob = np.exp(generator.normal(0, 3, (n, classes)))
    prob = (prob / prob.sum(axis=1, keepdims=True)).astype(np.float16)
    records = np.zeros(n, record_dtype(k))
    records["class_id"] = np.argsort(-prob, axis=1, kind="stable")[:, :k]
    records["prob"] = np.take_along_axis(prob, records["class_id"].astype(int), axis=1)
    records["seed"] = generator.integers(0, 2**31, n)
    return records


def test_the_reader_and_the_writer_are_those_of_a_scalar_program(tmp_path: Path) -> None:
    wanted = {f"n{i:03d}": (2**31 - 1 - i, [i, 40_000 + i, 65_535], [0.5, 0.25, 6e-8 * 2]) for i in range(5)}
    scalar_write(tmp_path / "theirs", 0, wanted)
    file = RankFile(tmp_path / "theirs", 0, 3)
    assert file.sha256()
    assert [(r["seed"], *r["class_id"]) for r in file.records] == [(r[0], *r[1]) for r in wanted.values()]
    (tmp_path / "ours").mkdir()
    with RankWriter(tmp_path / "ours", 0, 3, 5) as writer:
        writer.records[::-1] = file.records[::-1]
        writer.write_keys(file.keys().decode().split())
    assert scalar_read(tmp_path / "ours", 3) == scalar_read(tmp_path / "theirs", 3)
    for name in ("rank0-keys.txt", "rank0-values.bin"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_the_reader_of_one_record_reads_what_the_map_does(tmp_path: Path) -> None:
    with RankWriter(tmp_path, 2, 10, 20) as writer:
        writer.records[:] = random_records(20, 10, 50)
        writer.write_keys(map(str, range(20)))
    file, reader = RankFile(tmp_path, 2, 10), RecordReader(tmp_path / "rank2-values.bin", 10)
    for number in (19, 0, 7):
        seed, ids, prob = reader.read(number)
        record = file.records[number]
        assert seed == record["seed"]
        assert np.array_equal(ids, record["class_id"])
        assert np.array_equal(prob, record["prob"])
    reader.close()


def test_an_empty_pair_is_no_records(tmp_path: Path) -> None:
    with RankWriter(tmp_path, 0, 3, 0) as writer:
        writer.write_keys([])
    assert RankFile(tmp_path, 0, 3).sha256()
    assert len(RankFile(tmp_path, 0, 3).records) == 0


@pytest.mark.parametrize(
    ("name", "cut", "line"),
    [
        ("keys.txt", 1, r"rank1-keys.txt: ends within a line, after 3 whole keys; copy it again"),
        ("keys.txt", 2, r"rank1-keys.txt: ends within a line, after 3 whole keys"),
        ("keys.txt", 3, r"rank1-values.bin: 4 records of 16 bytes, rank1-keys.txt has 3 keys"),
        ("keys.txt", 12, r"rank1-values.bin: 4 records of 16 bytes, rank1-keys.txt has 0 keys"),
        ("values.bin", 1, r"rank1-values.bin: 3 records and 15 bytes of 16 bytes, rank1-keys.txt has 4 keys"),
        ("values.bin", 16, r"rank1-values.bin: 3 records of 16 bytes, rank1-keys.txt has 4 keys"),
        ("values.bin", 64, r"rank1-values.bin: 0 records of 16 bytes, rank1-keys.txt has 4 keys"),
        ("values.bin", None, r"rank1-values.bin: missing, the other file of the pair is there"),
        ("keys.txt", None, r"rank1-keys.txt: missing, the other file of the pair is there"),
    ],
)
def test_truncated_files_are_named(name: str, cut: int | None, line: str, tmp_path: Path) -> None:
    scalar_write(tmp_path / "logits_top3_epoch0", 1, {f"{i}0": (i, [0, 1, 2], [0.5, 0.25, 0.125]) for i in range(4)})
    path = tmp_path / "logits_top3_epoch0" / f"rank1-{name}"
    if cut is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-cut])
    [epoch] = epochs(tmp_path)
    with pytest.raises(DamagedError, match=line):
        epoch.ranks[0].sha256()


def test_epochs_are_ascending_and_of_one_k(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no folders logits_top\{K\}_epoch\{E\}"):
        epochs(tmp_path)
    for number in (10, 9, 2):
        scalar_write(tmp_path / f"logits_top2_epoch{number}", 0, {})
    (tmp_path / "logits_top2_epochs").mkdir()
    assert [epoch.number for epoch in epochs(tmp_path)] == [2, 9, 10]
    scalar_write(tmp_path / "logits_top3_epoch3", 0, {})
    with pytest.raises(MismatchError, match="has logits of 2 classes and of 3"):
        epochs(tmp_path)
    (tmp_path / "logits_top2_epoch4").mkdir()
    with pytest.raises(DamagedError, match="logits_top2_epoch4: has no files"):
        epochs(tmp_path)


def test_rows_are_the_logs_of_probabilities_and_negative_tails_are_nothing() -> None:
    records = random_records(500, 5, 10)
    rest = 1 - records["prob"].astype(np.float64).sum(axis=1)
    rows, _, negative = to_rows(records, np.arange(500), 10)
    assert negative == (rest < 0).sum() > 0
    assert np.array_equal(np.isneginf(rows.log_tail), rest <= 0)
    assert np.allclose(np.exp(rows.log_tail[rest > 0]), rest[rest > 0])
    assert np.allclose(np.exp(rows.log_prob), records["prob"].astype(np.float64))


def test_a_probability_of_nothing_and_all_classes() -> None:
    records = np.zeros(1, record_dtype(2))
    records["class_id"], records["prob"] = [[1, 0]], [[0.75, 0]]
    rows, _, negative = to_rows(records, np.zeros(1, np.int64), 2)
    assert np.isneginf(rows.log_prob[0, 1])
    assert np.isneginf(rows.log_tail[0])
    assert negative == 0


def test_every_float16_probability_comes_back_to_the_bit() -> None:
    prob = np.arange(np.float16(1).view(np.uint16) + 1, dtype=np.uint16).view(np.float16)
    records = np.zeros(len(prob), record_dtype(1))
    records["prob"] = prob[:, None]
    rows, correction, _ = to_rows(records, np.arange(len(prob)), 2)
    kept = Rows(rows.sample_id, rows.class_id, rows.log_prob.astype(np.float16), rows.log_tail)
    assert np.array_equal(to_records(kept, records["seed"], correction), records)
    assert np.abs(correction.astype(int)).max() < 32


def test_rows_that_are_not_in_order_are_put_in_order() -> None:
    records = np.zeros(1, record_dtype(3))
    records["class_id"], records["prob"] = [[7, 8, 9]], [[0.125, 0.5, 0.25]]
    rows, _, _ = to_rows(records, np.zeros(1, np.int64), 10)
    assert rows.class_id.tolist() == [[8, 9, 7]]


@pytest.mark.parametrize(
    ("class_id", "prob", "reason"),
    [
        ([3, 5], [0.5, 0.25], "has a class above 4"),
        ([3, 65535], [0.5, 0.25], "has a class above 4"),
        ([3, 3], [0.5, 0.25], "has a class twice"),
        ([3, 2], [0.5, -0.25], "has values that are no probabilities"),
        ([3, 2], [1.5, 0.25], "has values that are no probabilities"),
        ([3, 2], [0.5, np.nan], "has values that are no probabilities"),
    ],
)
def test_wrong_records(class_id: list[int], prob: list[float], reason: str) -> None:
    records = random_records(4, 2, 5)
    assert wrong_record(records, 5) is None
    records["class_id"][2], records["prob"][2] = class_id, prob
    assert wrong_record(records, 5) == (2, reason)


def test_a_store_of_our_own_is_exported(tmp_path: Path, make_plan: Make, fill_store: Make) -> None:
    fill_store(tmp_path / "store", make_plan(views=2), skip=(4,))
    store = Store(tmp_path / "store")
    done = export_tinyvit(store, tmp_path / "out", report=QUIET)
    assert (done.status, done.rows, done.epochs, done.bytes) == ("done", 18, 2, 18 * 16)
    for view in range(2):
        found = scalar_read(tmp_path / f"out/logits_top3_epoch{view}", 3)
        assert list(found) == [str(i) for i in range(10) if i != 4]
        rows = store.rows(view, store.sample_ids)
        for row, (seed, ids, prob) in enumerate(found.values()):
            assert ids == rows.class_id[row].tolist()
            assert np.allclose(prob, np.exp(rows.log_prob[row].astype(float)), rtol=1e-3)
            assert 0 <= seed < 2**31
    assert export_tinyvit(store, tmp_path / "out", report=QUIET).status == "already_done"


def test_a_killed_export_leaves_no_epoch_that_looks_complete(
    tmp_path: Path, make_plan: Make, fill_store: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_store(tmp_path / "store", make_plan(views=3))
    store, out = Store(tmp_path / "store"), tmp_path / "out"
    monkeypatch.setattr(Store, "rows", lambda *_: pytest.fail("no"))
    with pytest.raises(pytest.fail.Exception):
        export_tinyvit(store, out, report=QUIET)
    assert list(out.glob("logits*")) == []
    monkeypatch.undo()
    export_tinyvit(store, out, report=QUIET)
    assert sorted(path.name for path in out.iterdir()) == [
        "export.json", "logits_top3_epoch0", "logits_top3_epoch1", "logits_top3_epoch2",
    ]  # fmt: skip


def test_what_cannot_be_exported(tmp_path: Path, make_plan: Make, fill_store: Make) -> None:
    fill_store(tmp_path / "a", make_plan())
    fill_store(tmp_path / "b", make_plan(seed=1))
    export_tinyvit(Store(tmp_path / "a"), tmp_path / "out", report=QUIET)
    with pytest.raises(MismatchError, match=r"out: holds another export \(store: [0-9a-f]+, [0-9a-f]+: there, asked\)"):
        export_tinyvit(Store(tmp_path / "b"), tmp_path / "out", report=QUIET)
    with pytest.raises(UsageError, match="is not empty and not a folder of exported logits"):
        export_tinyvit(Store(tmp_path / "b"), tmp_path / "a", report=QUIET)
