from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distill_cli.errors import MismatchError, UsageError
from distill_cli.report import Report
from distill_cli.store.merge import merge
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.trim import trim
from distill_cli.store.writer import StoreWriter

Make = Callable[..., object]
QUIET = Report(quiet=True)
IDS = np.arange(10)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def source(tmp_path: Path, make_plan: Make, fill_store: Make) -> Store:
    """3 views of 10 samples, 8 classes, 6 kept."""
    fill_store(tmp_path / "source", make_plan(num_classes=8, top_k=6, views=3), IDS % 8)
    return Store(tmp_path / "source")


def probabilities(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    return np.exp(rows.log_prob.astype(np.float64)), np.exp(rows.log_tail.astype(np.float64))


def test_the_mass_that_goes_is_in_the_tail(source: Store, tmp_path: Path) -> None:
    trim(source, tmp_path / "out", top_k=2, report=QUIET)
    out = Store(tmp_path / "out")
    for view in range(3):
        before, after = source.rows(view, IDS), out.rows(view, IDS)
        (p, tail), (q, rest) = probabilities(before), probabilities(after)
        assert np.array_equal(after.class_id, before.class_id[:, :2])
        assert np.array_equal(after.log_prob, before.log_prob[:, :2])
        expected = np.log(tail + p[:, 2:].sum(axis=1)).astype(np.float32)
        assert np.array_equal(after.log_tail, expected)
        assert np.allclose(q.sum(axis=1) + rest, p.sum(axis=1) + tail, rtol=1e-7)


def test_the_loss_of_a_trim_is_that_of_a_uniform_tail(source: Store, tmp_path: Path) -> None:
    """KL(before || after) is that of the dropped classes against their mean, computed densely beside."""
    trim(source, tmp_path / "out", top_k=3, report=QUIET)
    dense = []
    for store, k in ((source, 6), (Store(tmp_path / "out"), 3)):
        rows = store.rows(0, IDS)
        p, tail = probabilities(rows)
        full = np.repeat(tail[:, None] / (8 - k), 8, axis=1)
        np.put_along_axis(full, rows.class_id.astype(np.int64), p, axis=1)
        dense.append(full / full.sum(axis=1, keepdims=True))
    kl = (dense[0] * np.log(dense[0] / dense[1])).sum(axis=1)
    gone = np.sort(dense[0], axis=1)[:, :5]
    direct = (gone * np.log(gone / gone.mean(axis=1, keepdims=True))).sum(axis=1)
    assert np.allclose(kl, direct, atol=1e-6)


def test_what_is_known_of_shards_and_plans_stays_true(source: Store, tmp_path: Path) -> None:
    summary = trim(source, tmp_path / "out", top_k=4, views=2, report=QUIET)
    out = Store(tmp_path / "out")
    assert (out.views, out.plan.top_k, out.plan.min_k, out.drawn) == (2, 4, 1, source.drawn[:2])
    assert out.plan.lineage == {
        "command": "trim", "store": source.id, "plan": source.plan.sha256, "top_k": 6, "views": 3, "codec": "exact",
        "bits": None, "lineage": None,
    }  # fmt: skip
    for view, shard in out.plan.every_shard():
        ours, theirs = out.shard(view, shard), source.shard(view, shard)
        assert np.array_equal(ours.probe_crc, theirs.probe_crc)
        assert (ours.header.top1, ours.header.top5) == (theirs.header.top1, None)
    assert out.manifests[0].top1 is not None
    assert out.manifests[0].top5 is None
    assert source.manifests[0].top5 is not None
    assert summary.bytes < summary.bytes_before == source.manifests[0].bytes
    assert summary.store_id == out.id


def test_the_lineage_of_a_trimmed_store_is_nested(source: Store, tmp_path: Path) -> None:
    trim(source, tmp_path / "a", top_k=5, report=QUIET)
    first = Store(tmp_path / "a")
    assert first.manifests[0].top5 == source.manifests[0].top5
    trim(first, tmp_path / "b", views=1, report=QUIET)
    lineage = Store(tmp_path / "b").plan.lineage
    assert lineage is not None
    assert (lineage["store"], lineage["lineage"]["store"]) == (first.id, source.id)


def test_every_generation_is_trimmed_and_later_ones_can_go(tmp_path: Path, make_plan: Make, fill_store: Make) -> None:
    for name, changes in (("a", {"views": 2}), ("b", {"first_view": 2, "top_k": 2}), ("c", {"first_view": 3})):
        fill_store(tmp_path / name, make_plan(**changes), skip=(3,))
    merge([tmp_path / name for name in "abc"], tmp_path / "all", QUIET)
    source = Store(tmp_path / "all")
    trim(source, tmp_path / "out", top_k=2, views=3, report=QUIET)
    out = Store(tmp_path / "out")
    assert [generation.plan.top_k for generation in out.generations] == [2, 2]
    assert out.drawn == ((0, 0), (0, 1), (0, 2))
    assert out.manifests[1].skipped == (3,)
    trim(source, tmp_path / "one", views=1, report=QUIET)
    assert Store(tmp_path / "one").views == 1


def test_rows_of_a_kept_mass_stay_rows_of_a_kept_mass(tmp_path: Path, make_plan: Make, make_rows: Make) -> None:
    plan = make_plan(num_classes=8, top_k=6, keep_mass=0.9, min_k=4)
    (tmp_path / "source").mkdir()
    writer = StoreWriter(tmp_path / "source", plan)
    for view, shard in plan.every_shard():
        rows = make_rows(plan, view, shard)
        count = np.arange(len(rows)) % 3 + 4
        gone = np.arange(6) >= count[:, None]
        tail = np.log(np.exp(rows.log_tail) + np.where(gone, np.exp(rows.log_prob), 0).sum(axis=1))
        log_prob, class_id = np.where(gone, -np.inf, rows.log_prob), np.where(gone, 0, rows.class_id)
        writer.write(view, shard, Rows(rows.sample_id, class_id, log_prob, tail, count), np.zeros(0, np.uint32))
    writer.finish()
    source = Store(tmp_path / "source")
    before = source.rows(0, IDS)
    for k, least in ((5, 4), (2, 2)):
        trim(source, tmp_path / str(k), top_k=k, report=QUIET)
        out = Store(tmp_path / str(k))
        after = out.rows(0, IDS)
        assert (out.plan.keep_mass, out.plan.min_k) == (0.9, least)
        assert after.count is not None
        assert before.count is not None
        assert np.array_equal(after.count, np.minimum(before.count, k))
        p, tail = probabilities(after)
        assert np.allclose(
            p.sum(axis=1) + tail, sum(np.atleast_2d(part.T).sum(axis=0) for part in probabilities(before))
        )


def test_the_classes_of_a_sampled_store_cannot_be_trimmed(tmp_path: Path, make_plan: Make, make_rows: Make) -> None:
    plan = make_plan(top_k=1, sample=2, views=2)
    (tmp_path / "source").mkdir()
    writer = StoreWriter(tmp_path / "source", plan)
    for view, shard in plan.every_shard():
        rows = make_rows(replace(plan, top_k=3), view, shard)
        rows = replace(rows, count=np.full(len(rows), 3), log_tail=np.full(len(rows), -np.inf))
        writer.write(view, shard, rows, np.zeros(0, np.uint32))
    writer.finish()
    source = Store(tmp_path / "source")
    with pytest.raises(MismatchError, match="--top-k 1 asked, its rows hold draws that stand for the whole tail"):
        trim(source, tmp_path / "out", top_k=1, report=QUIET)
    trim(source, tmp_path / "out", views=1, report=QUIET)
    ours, theirs = Store(tmp_path / "out").rows(0, IDS), source.rows(0, IDS)
    assert np.array_equal(ours.log_prob, theirs.log_prob)


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({}, "nothing to trim; give --top-k, --views, --codec or --bits"),
        ({"top_k": 7}, "--top-k 7: store .* keeps 6 classes of a row; give 1 to 6"),
        ({"top_k": 0}, "--top-k 0"),
        ({"views": 4}, "--views 4: store .* has 3; give 1 to 3"),
        ({"codec": "zip"}, "--codec zip: no such codec; there are exact, compact"),
        ({"bits": 5}, "--bits 5: is of --codec compact, 4 to 12"),
        ({"codec": "compact", "bits": 3}, "--bits 3: is of --codec compact, 4 to 12"),
    ],
)
def test_what_cannot_be_asked(asked: dict[str, int], line: str, source: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=line):
        trim(source, tmp_path / "out", **asked, report=QUIET)
    assert not (tmp_path / "out").exists()


def test_killed_anywhere_the_same_command_finishes(
    source: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trim(source, tmp_path / "undisturbed", top_k=2, report=QUIET)
    write, out = StoreWriter.write, tmp_path / "out"
    for survived in (2, 5):
        left = iter(range(survived))

        def dies(self: StoreWriter, *arguments: object, left: object = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "write", dies)
            with pytest.raises(KeyboardInterrupt):
                trim(source, out, top_k=2, report=QUIET)
        assert not (out / "manifest.json").exists()
    assert trim(source, out, top_k=2, report=QUIET).status == "done"
    assert files(out) == files(tmp_path / "undisturbed")
    assert trim(source, out, top_k=2, report=QUIET).status == "already_done"
    with pytest.raises(MismatchError, match=r"out: holds another store \(top_k: 2, 3: there, asked\)"):
        trim(source, out, top_k=3, report=QUIET)


def test_another_codec(source: Store, tmp_path: Path) -> None:
    trim(source, tmp_path / "small", codec="compact", report=QUIET)
    small = Store(tmp_path / "small")
    assert (small.plan.codec, small.plan.bits) == ("compact", 8)
    trim(small, tmp_path / "back", codec="exact", report=QUIET)
    ours, theirs = Store(tmp_path / "back").rows(1, IDS), source.rows(1, IDS)
    assert np.array_equal(np.sort(ours.class_id), np.sort(theirs.class_id))
    assert np.allclose(np.exp(ours.log_prob.astype(float)), np.exp(theirs.log_prob.astype(float)), atol=0.02)
