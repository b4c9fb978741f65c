import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distill_cli.errors import DamagedError, MismatchError, UsageError
from distill_cli.report import Report
from distill_cli.store import merge as merging
from distill_cli.store.merge import merge
from distill_cli.store.reader import Store

Make = Callable[..., object]
QUIET = Report(quiet=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def whole(tmp_path: Path, make_plan: Make, fill_store: Make) -> Path:
    """Two views in six shards."""
    fill_store(tmp_path / "whole", make_plan(views=2), np.arange(10) % 5)
    return tmp_path / "whole"


@pytest.fixture
def halves(tmp_path: Path, whole: Path) -> tuple[Path, Path]:
    """The same, captured apart: its first four shards and its last three; one of them is in both."""
    paths = [f"view-{view:03d}/shard-{shard:05d}.h5" for view in range(2) for shard in range(3)]
    for name, mine in (("a", paths[:4]), ("b", paths[3:])):
        for path in ("plan.json", *mine):
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((whole / path).read_bytes())
    return tmp_path / "a", tmp_path / "b"


def test_shards_captured_apart_are_the_store_captured_at_once(
    halves: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    done = merge(halves, tmp_path / "out", QUIET)
    assert (done.status, done.shards, done.linked, done.copied, done.views) == ("done", 6, 6, 0, 2)
    assert files(tmp_path / "out") == files(whole)
    assert merge(halves, tmp_path / "out", QUIET).status == "already_done"


def test_the_missing_are_counted_and_the_other_part_finishes(
    halves: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(DamagedError, match="out: 2 of 6 shards are in none of these stores; the others are kept"):
        merge(halves[:1], tmp_path / "out", QUIET)
    with pytest.raises(DamagedError, match="2 of 6 shards missing"):
        Store(tmp_path / "out")
    merge(halves[1:], tmp_path / "out", QUIET)
    assert files(tmp_path / "out") == files(whole)


def test_duplicates_that_differ_are_refused(
    halves: tuple[Path, Path], tmp_path: Path, make_plan: Make, fill_store: Make
) -> None:
    other = tmp_path / "other"
    fill_store(other, make_plan(views=2), np.zeros(10, int))
    with pytest.raises(DamagedError, match=r"other/view-000/shard-00000.h5: is not the shard that .*a/view-000/sha"):
        merge([halves[0], other], tmp_path / "out", QUIET)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_damaged_shard_does_not_go_in(manifest: bool, whole: Path, tmp_path: Path) -> None:
    shard = whole / "view-001/shard-00002.h5"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    if not manifest:
        (whole / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"view-001/shard-00002.h5: its bytes are not those that were written"):
        merge([whole], tmp_path / "out", QUIET)


def test_a_shard_that_is_whole_but_not_the_manifests_does_not_go_in(
    whole: Path, tmp_path: Path, make_plan: Make, fill_store: Make
) -> None:
    fill_store(tmp_path / "other", make_plan(views=2), np.zeros(10, int))
    other = (tmp_path / "other/view-000/shard-00000.h5").read_bytes()
    (whole / "view-000/shard-00000.h5").write_bytes(other)
    with pytest.raises(DamagedError, match="its sha256 is not the manifest's"):
        merge([whole], tmp_path / "out", QUIET)


def test_views_captured_apart_come_one_behind_the_other(tmp_path: Path, make_plan: Make, fill_store: Make) -> None:
    sources = []
    for number, changes in enumerate([{"views": 2}, {"first_view": 2, "shard_rows": 5}, {"seed": 1, "top_k": 2}]):
        sources.append(tmp_path / str(number))
        fill_store(sources[-1], make_plan(**changes), skip=(number,))
    merge(sources, tmp_path / "out", QUIET)
    out, parts = Store(tmp_path / "out"), [Store(path) for path in sources]
    assert out.drawn == ((0, 0), (0, 1), (0, 2), (1, 0))
    ids = out.sample_ids
    assert ids.tolist() == list(range(3, 10))
    for view, (part, within) in enumerate([(0, 0), (0, 1), (1, 0), (2, 0)]):
        ours, theirs = out.rows(view, ids), parts[part].rows(within, ids)
        for name in ("class_id", "log_prob", "log_tail"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert (tmp_path / "out/plan-001.json").read_bytes() == (sources[1] / "plan.json").read_bytes()
    again = merge([tmp_path / "out", sources[2]], tmp_path / "again", QUIET)
    assert (again.plans, files(tmp_path / "again")) == (3, files(tmp_path / "out"))


def test_the_same_view_twice_is_refused(tmp_path: Path, make_plan: Make, fill_store: Make) -> None:
    fill_store(tmp_path / "a", make_plan(views=2))
    fill_store(tmp_path / "b", make_plan(first_view=1, top_k=2))
    with pytest.raises(
        MismatchError, match=r"b: draws view 1 of seed 0, as .*a does under another plan \(.*top_k: 3, "
    ):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


def test_everything_that_must_agree_is_named(tmp_path: Path, make_plan: Make, fill_store: Make) -> None:
    fill_store(tmp_path / "a", make_plan())
    fill_store(tmp_path / "b", make_plan(samples=9, transform={"image_size": 64}, first_view=1))
    with pytest.raises(MismatchError, match=r"b: is not of the same .* \(samples: 10, 9; transform.image_size: 32, 64"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", QUIET)


def test_another_out_is_refused(halves: tuple[Path, Path], tmp_path: Path, make_plan: Make, fill_store: Make) -> None:
    fill_store(tmp_path / "more", make_plan(first_view=2))
    fill_store(tmp_path / "other", make_plan(views=2, seed=7))
    with pytest.raises(MismatchError, match=r"other: holds another store \(seed: 7, 0: there, asked\)"):
        merge(halves, tmp_path / "other", QUIET)
    merge(halves, tmp_path / "out", QUIET)
    with pytest.raises(MismatchError, match=r"out: holds another store \(generations: 1, 2: there, asked\)"):
        merge([*halves, tmp_path / "more"], tmp_path / "out", QUIET)
    with pytest.raises(UsageError, match="is one of the stores"):
        merge(halves, halves[0], QUIET)


def test_where_there_are_no_links_shards_are_copied(
    halves: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(merging.os, "link", no_links)
    done = merge(halves, tmp_path / "out", QUIET)
    assert (done.linked, done.copied) == (0, 6)
    assert files(tmp_path / "out") == files(whole)


def _merge_slowly(stores: list[Path], out: Path) -> None:
    bring = merging._bring

    def slowly(source: Path, target: Path) -> str:
        time.sleep(0.02)
        return bring(source, target)

    merging._bring = slowly
    merge(stores, out, QUIET)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_killed_in_the_middle_the_same_command_finishes(
    after: int, halves: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=_merge_slowly, args=(list(halves), out))
    process.start()
    while process.is_alive() and len(list(out.rglob("*.h5"))) < after:
        time.sleep(0.001)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (out / "manifest.json").exists()
    assert merge(halves, out, QUIET).linked <= 6 - after
    assert files(out) == files(whole)
